//! What lies below HTTP at a guest port: nothing, or TLS.
//!
//! AWS finds out by itself whether an app speaks TLS (aws-behaviour §1.2, §1.4); so do we, once for each port of a microVM:
//! a connection of its own carries a ClientHello, and its first bytes back decide. Asking first costs one connection; to
//! send the request in the clear and see what comes would send it twice. The answer is kept over sleeps, because what
//! listens comes back with the memory, and is given up when the app breaks off.
//!
//! Owns: those answers, and the TLS client. Certificates are not checked: the channel ends in the microVM that the token
//! named, there is nobody in between, and an app inside has no certificate that anybody outside could check.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use dashmap::DashMap;
use idle_controller::{Awake, MicrovmHandle};
use model::{Generation, MicrovmId, MicrovmState, Port};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::ring,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    sync::OnceCell,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use vmm_runtime::engine::{ByteStream, DialError, GuestStream};

use super::{connector::DialFailure, links::Speaks};
use crate::{Limits, reply::Reason};

/// How long an app may take to say the first byte to a ClientHello; then it is taken for one that speaks no TLS.
const PROBE_DEADLINE: Duration = Duration::from_secs(3);
/// Answers that are kept; a guest may listen on 65,535 ports. When there are more, all are asked for anew.
const KNOWN: usize = 16_384;
/// The content types of a TLS record that can answer a ClientHello (RFC 8446 §5.1), and the major version in it.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const MAJOR_VERSION: u8 = 3;
/// Ends the ClientHello for an app that reads lines: it refuses at once, where it would wait for the end of a header.
/// An app of TLS has answered before it reads this.
const END_FOR_LINES: &[u8] = b"\r\n\r\n";
const H2: &[u8] = b"h2";
const HTTP_1_1: &[u8] = b"http/1.1";

/// What lies below HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transport {
    /// Nothing.
    Plain,
    /// TLS.
    Tls {
        /// Whether the app picks HTTP/2 where it may pick.
        h2: bool,
    },
}

/// What is known of apps, and how to speak TLS with them.
pub(crate) struct Transports {
    known: DashMap<(MicrovmId, Port), Arc<OnceCell<Transport>>>,
    limits: Limits,
    either: Arc<ClientConfig>,
    http1: Arc<ClientConfig>,
    http2: Arc<ClientConfig>,
}

impl Transports {
    /// Knows nothing yet.
    pub fn new(limits: Limits) -> Self {
        Self { known: DashMap::new(), limits, either: client(&[H2, HTTP_1_1]), http1: client(&[HTTP_1_1]), http2: client(&[H2]) }
    }

    /// What the app at this port speaks, if that is known.
    pub fn known(&self, microvm: MicrovmId, port: Port) -> Option<Transport> {
        self.known.get(&(microvm, port)).and_then(|cell| cell.get().copied())
    }

    /// What the app at this port speaks; asks it if nobody has yet. Those who come meanwhile wait for the one answer.
    pub async fn of(
        &self,
        microvm: &MicrovmHandle,
        awake: &Awake,
        port: Port,
        name: impl FnOnce() -> ServerName<'static>,
    ) -> Result<Transport, DialFailure> {
        let key = (microvm.id(), port);
        if let Some(transport) = self.known(key.0, key.1) {
            return Ok(transport);
        }
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        let cell = self.known.entry(key).or_default().clone();
        let found = cell.get_or_try_init(|| self.ask(microvm, awake, port, name())).await.copied();
        if found.is_err() {
            self.known.remove_if(&key, |_, cell| !cell.initialized());
        }
        found
    }

    /// The app did not do as it was known to: it is asked anew by the next request.
    pub fn forget(&self, microvm: MicrovmId, port: Port) {
        self.known.remove(&(microvm, port));
    }

    /// TLS with an app, for one protocol.
    pub async fn wrap(&self, guest: GuestStream, speaks: Speaks, name: &ServerName<'static>) -> io::Result<GuestStream> {
        let config = match speaks {
            Speaks::Http1 | Speaks::WebSocket | Speaks::Shell => &self.http1,
            Speaks::Http2 => &self.http2,
        };
        Ok(Box::pin(Wrapped(TlsConnector::from(config.clone()).connect(name.clone(), guest).await?)))
    }

    async fn ask(&self, microvm: &MicrovmHandle, awake: &Awake, port: Port, name: ServerName<'static>) -> Result<Transport, DialFailure> {
        let deadline = self.limits.load().dial_deadline;
        let probe = dial(awake, port, deadline).await?;
        let answer = tokio::time::timeout(PROBE_DEADLINE, first_bytes(probe, hello(&self.either, &name))).await;
        match answer {
            Ok(Ok([HANDSHAKE | ALERT, MAJOR_VERSION])) => {}
            // Its silence may have been sleep.
            Err(_) if slept(microvm, awake.generation()) => return Err(DialFailure::Asleep),
            Ok(_) | Err(_) => return Ok(Transport::Plain),
        }
        let handshake = async {
            let guest = dial(awake, port, deadline).await?;
            TlsConnector::from(self.either.clone()).connect(name, guest).await.map_err(|_| DialFailure::Final(Reason::GuestBroke))
        };
        match tokio::time::timeout(deadline, handshake).await {
            Ok(tls) => Ok(Transport::Tls { h2: tls?.get_ref().1.alpn_protocol() == Some(H2) }),
            Err(_) if slept(microvm, awake.generation()) => Err(DialFailure::Asleep),
            Err(_) => Err(DialFailure::Final(Reason::GuestTimeout)),
        }
    }
}

/// A guest stream in TLS.
struct Wrapped(TlsStream<GuestStream>);

/// In bytes of TLS.
impl ByteStream for Wrapped {
    fn written(&self) -> u64 {
        self.0.get_ref().0.written()
    }

    fn poll_untouched(&mut self, cx: &mut Context<'_>, from: u64) -> Poll<bool> {
        self.0.get_mut().0.poll_untouched(cx, from)
    }
}

impl AsyncRead for Wrapped {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wrapped {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A stream to a guest port, with a deadline.
pub(crate) async fn dial(awake: &Awake, port: Port, deadline: Duration) -> Result<GuestStream, DialFailure> {
    dialled(awake.dial(port), deadline).await
}

/// A stream to a new shell, with a deadline.
pub(crate) async fn dial_shell(awake: &Awake, deadline: Duration) -> Result<GuestStream, DialFailure> {
    dialled(awake.dial_shell(), deadline).await
}

async fn dialled(dial: impl Future<Output = Result<GuestStream, DialError>>, deadline: Duration) -> Result<GuestStream, DialFailure> {
    match tokio::time::timeout(deadline, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(DialError::Asleep)) => Err(DialFailure::Asleep),
        Ok(Err(DialError::Refused { .. })) => Err(DialFailure::Final(Reason::PortNotListening)),
        Ok(Err(DialError::NoShell)) => Err(DialFailure::Final(Reason::NoShell)),
        Ok(Err(DialError::Gone)) => Err(DialFailure::Final(Reason::Terminated)),
        Ok(Err(DialError::Timeout { .. })) | Err(_) => Err(DialFailure::Final(Reason::GuestTimeout)),
    }
}

/// Whether the microVM sleeps, or has slept since it had this generation.
pub(crate) fn slept(microvm: &MicrovmHandle, generation: Generation) -> bool {
    let view = microvm.view();
    view.state != MicrovmState::Running || view.generation != generation
}

async fn first_bytes(mut guest: GuestStream, hello: Vec<u8>) -> io::Result<[u8; 2]> {
    let mut first = [0; 2];
    let (mut read, mut write) = tokio::io::split(&mut guest);
    // An app may have refused before it has taken all of it: what it says counts, and not whether it listens.
    let send = async {
        let _ = write.write_all(&hello).await;
        let _ = write.flush().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = read.read_exact(&mut first) => answer.map(|_| first),
        () = send => Ok(first),
    }
}

fn hello(config: &Arc<ClientConfig>, name: &ServerName<'static>) -> Vec<u8> {
    let mut hello = Vec::with_capacity(512);
    // Writing to memory does not fail, and a config that made one connection makes another.
    if let Ok(mut connection) = ClientConnection::new(config.clone(), name.clone()) {
        while connection.wants_write() && connection.write_tls(&mut hello).is_ok() {}
    }
    hello.extend_from_slice(END_FOR_LINES);
    hello
}

fn client(protocols: &[&[u8]]) -> Arc<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let verifier = Arc::new(AnyCertificate(provider.signature_verification_algorithms.supported_schemes()));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring speaks every version of TLS that rustls does")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    // Nothing of one microVM's connections is kept where another's are made.
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

/// Takes every certificate.
#[derive(Debug)]
struct AnyCertificate(Vec<SignatureScheme>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    // A signature by the key of a certificate that anybody could have made shows nothing.
    fn verify_tls12_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(&self, _: &[u8], _: &CertificateDer<'_>, _: &DigitallySignedStruct) -> Result<HandshakeSignatureValid, TlsError> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}
