//! Carries frames between a transport and a [`Mux`]. The same for both ends.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    frame::{Decoded, Decoder},
    mux::Mux,
};

/// Read at most about this much at a time.
const READ_BYTES: usize = 64 * 1024;

/// Received bytes, cut into frames.
pub(crate) struct FrameReader<R> {
    io: R,
    decoder: Decoder,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(io: R, decoder: Decoder) -> Self {
        Self { io, decoder }
    }

    /// The next frame; `None` at the end of the transport. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Option<Decoded>> {
        loop {
            if let Some(decoded) = self.decoder.next() {
                return Ok(Some(decoded));
            }
            if !self.receive().await? {
                return Ok(None);
            }
        }
    }

    /// A frame that has already arrived.
    pub fn ready(&mut self) -> Option<Decoded> {
        self.decoder.next()
    }

    /// Waits for more bytes; `false` at the end of the transport. Cancel-safe.
    pub async fn receive(&mut self) -> io::Result<bool> {
        let buffer = self.decoder.buffer();
        buffer.reserve(READ_BYTES);
        Ok(self.io.read_buf(buffer).await? > 0)
    }
}

/// Writes what the mux has to send, until the transport fails.
pub(crate) async fn write_frames<W: AsyncWrite + Unpin>(mux: &Mux, mut io: W) -> io::Error {
    let mut batch = BytesMut::new();
    loop {
        mux.fill(&mut batch).await;
        let written = async {
            io.write_all(&batch).await?;
            io.flush().await
        };
        if let Err(error) = written.await {
            return error;
        }
        batch.clear();
    }
}
