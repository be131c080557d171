//! Questions for names, passed on to the host's name servers and back, unread but for what tells an answer from a stray packet.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const PORT: u16 = 53;
/// Of those that are named.
const MAX_SERVERS: usize = 3;
/// Bytes of a message's header (RFC 1035 §4.1.1).
const HEADER: usize = 12;
/// A question is a name and little more.
const MAX_QUESTION: usize = 4096;
/// How long one server has.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest may keep its stream without a question.
const IDLE: Duration = Duration::from_secs(30);

/// Answers questions, each behind its length, until the guest asks no more.
pub(super) async fn serve(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), servers: &[SocketAddr]) -> io::Result<()> {
    loop {
        let length = match tokio::time::timeout(IDLE, stream.read_u16()).await {
            Ok(Ok(length)) => usize::from(length),
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(()),
        };
        if !(HEADER..=MAX_QUESTION).contains(&length) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut question = vec![0; length];
        stream.read_exact(&mut question).await?;
        let answer = ask_all(&question, servers).await;
        let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
        stream.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await?;
    }
}

/// The first answer of any server, or one that says that there was none.
async fn ask_all(question: &[u8], servers: &[SocketAddr]) -> Vec<u8> {
    let of_the_host = if servers.is_empty() { of_the_host().await } else { Vec::new() };
    for server in servers.iter().chain(&of_the_host) {
        let asked = tokio::time::timeout(PATIENCE, ask(question, *server)).await;
        if let Ok(Ok(answer)) = asked {
            return answer;
        }
    }
    failure(question)
}

async fn of_the_host() -> Vec<SocketAddr> {
    // Read each time: it changes with the host's network.
    name_servers(&tokio::fs::read_to_string(RESOLV_CONF).await.unwrap_or_default())
}

fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let named = resolv_conf.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok());
    named.map(|ip| SocketAddr::new(ip, PORT)).take(MAX_SERVERS).collect()
}

async fn ask(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let local: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((local, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut answer).await?;
        if is_answer(&answer[..length], question) {
            answer.truncate(length);
            break;
        }
    }
    let cut = answer[2] & 0x02 != 0;
    if cut { ask_by_tcp(question, server).await } else { Ok(answer) }
}

async fn ask_by_tcp(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    if is_answer(&answer, question) { Ok(answer) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// The same number, and the bit of an answer.
fn is_answer(answer: &[u8], question: &[u8]) -> bool {
    answer.len() >= HEADER && answer[..2] == question[..2] && answer[2] & 0x80 != 0
}

/// SERVFAIL.
fn failure(question: &[u8]) -> Vec<u8> {
    let mut answer = question[..HEADER].to_vec();
    answer[2] = 0x80 | (question[2] & 0x79);
    answer[3] = 0x80 | 2;
    answer[4..].fill(0);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04host\x07example\x00\x00\x01\x00\x01";

    async fn asked(servers: &[SocketAddr], question: &[u8]) -> io::Result<Vec<u8>> {
        let (mut guest, mut host) = tokio::io::duplex(1 << 16);
        guest.write_all(&[&(question.len() as u16).to_be_bytes()[..], question].concat()).await?;
        guest.shutdown().await?;
        serve(&mut host, servers).await?;
        let mut answer = vec![0; guest.read_u16().await?.into()];
        guest.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn a_question_goes_to_the_server_and_its_answer_back() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let mut question = [0; 512];
            let (length, from) = server.recv_from(&mut question).await.unwrap();
            // Strays: another number, and no answer at all.
            server.send_to(&[9; 20], from).await.unwrap();
            server.send_to(&question[..length], from).await.unwrap();
            question[2] |= 0x80;
            server.send_to(&question[..length], from).await.unwrap();
        });
        let answer = asked(&[address], QUESTION).await.unwrap();
        assert_eq!((answer[2], &answer[3..]), (0x81, &QUESTION[3..]));
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn nobody_there_is_an_answer_too() {
        let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert_eq!(asked(&[nobody], QUESTION).await.unwrap(), [0x12, 0x34, 0x81, 0x82, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(asked(&[nobody], b"short").await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn resolv_conf_names_servers() {
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 1.1.1.1\n nameserver\t::1\nnameserver rubbish\nnameserver 8.8.8.8\nnameserver 8.8.4.4\n";
        let servers: Vec<_> = name_servers(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["1.1.1.1:53", "[::1]:53", "8.8.8.8:53"]);
    }
}
