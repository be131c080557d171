//! Credentials of the microVM's execution role, handed out as EC2's metadata service of version 2 does (aws-behaviour §5.3).
//!
//! ```text
//! PUT /latest/api/token                                              a token, for so many seconds
//! GET /latest/meta-data/iam/security-credentials/                    the role's name: execution_role
//! GET /latest/meta-data/iam/security-credentials/execution_role      its credentials
//! ```
//! Owns: tokens, and what is answered. What the credentials are is told by the host at each wake; a role that the operator has given
//! none has 404. They are for everybody in the guest, and nobody outside can come here.

use std::{
    collections::VecDeque,
    io,
    net::Ipv4Addr,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use protocol::agent::Role;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Where it answers.
pub(crate) const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// At this port.
pub(crate) const PORT: u16 = 80;

const ROLE_NAME: &str = "execution_role";
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials";
const TOKEN_FIELD: &str = "x-aws-ec2-metadata-token";
const TTL_FIELD: &str = "x-aws-ec2-metadata-token-ttl-seconds";
/// EC2's: six hours.
const MAX_TTL_SECS: u64 = 21_600;
/// As at AWS, a little less than an hour ahead: SDKs ask again some minutes before. What they get then is as fresh as the last wake.
const EXPIRES_IN: Duration = Duration::from_secs(55 * 60);
/// Of a request.
const MAX_HEADER_BYTES: usize = 8 * 1024;
const MAX_FIELDS: usize = 64;
/// Tokens that are remembered; who has an older one gets 401 and asks for another.
const MAX_TOKENS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// The service. Each mutex guards plain data for moments; they are never held together.
#[derive(Default)]
pub(crate) struct Metadata {
    role: Mutex<Option<Role>>,
    tokens: Mutex<VecDeque<(String, Instant)>>,
}

impl Metadata {
    /// What the microVM's role is from now on.
    pub fn set(&self, role: Option<Role>) {
        *self.role.lock() = role;
    }

    /// Whether there is a role at all; without one nothing answers here.
    pub fn has_role(&self) -> bool {
        self.role.lock().is_some()
    }

    /// Answers one request.
    pub async fn serve(&self, connection: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
        let header = tokio::time::timeout(PATIENCE, read_header(connection)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut request = httparse::Request::new(&mut fields);
        let answer = match request.parse(&header) {
            Ok(httparse::Status::Complete(_)) => self.answer(&request),
            _ => Answer::status("400 Bad Request"),
        };
        let kind = if answer.body.starts_with('{') { "application/json" } else { "text/plain" };
        let ttl = answer.ttl.map(|ttl| format!("{TTL_FIELD}: {ttl}\r\n")).unwrap_or_default();
        let wire = format!(
            "HTTP/1.1 {}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n{ttl}\r\n{}",
            answer.status,
            answer.body.len(),
            answer.body
        );
        connection.write_all(wire.as_bytes()).await?;
        connection.shutdown().await
    }

    fn answer(&self, request: &httparse::Request<'_, '_>) -> Answer {
        let field = |name: &str| {
            let found = request.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name));
            found.and_then(|field| std::str::from_utf8(field.value).ok()).map(str::trim)
        };
        let path = request.path.unwrap_or_default().split('?').next().unwrap_or_default().trim_end_matches('/');
        match request.method {
            // As EC2: who passes on other people's requests gets no token.
            Some("PUT") if path == "/latest/api/token" && field("x-forwarded-for").is_none() => self.token(field(TTL_FIELD)),
            Some("PUT") => Answer::status("403 Forbidden"),
            Some("GET") if !self.knows(field(TOKEN_FIELD)) => Answer::status("401 Unauthorized"),
            Some("GET") => self.read(path),
            _ => Answer::status("405 Method Not Allowed"),
        }
    }

    fn token(&self, ttl: Option<&str>) -> Answer {
        let Some(ttl) = ttl.and_then(|text| text.parse().ok()).filter(|ttl| (1..=MAX_TTL_SECS).contains(ttl)) else {
            return Answer::status("400 Bad Request");
        };
        let mut random = [0; 32];
        if rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).is_err() {
            return Answer::status("500 Internal Server Error");
        }
        let token = hex::encode(random);
        let mut tokens = self.tokens.lock();
        if tokens.len() >= MAX_TOKENS {
            tokens.pop_front();
        }
        tokens.push_back((token.clone(), Instant::now() + Duration::from_secs(ttl)));
        Answer { status: "200 OK", body: token, ttl: Some(ttl) }
    }

    fn knows(&self, token: Option<&str>) -> bool {
        let now = Instant::now();
        token.is_some_and(|token| self.tokens.lock().iter().any(|(known, until)| known == token && *until > now))
    }

    fn read(&self, path: &str) -> Answer {
        let credentials = self.role.lock().as_ref().and_then(|role| role.credentials.clone());
        let Some((credentials, rest)) = credentials.zip(path.strip_prefix(CREDENTIALS)) else { return Answer::status("404 Not Found") };
        match rest.strip_prefix('/') {
            None if rest.is_empty() => Answer { status: "200 OK", body: ROLE_NAME.to_owned(), ttl: None },
            Some(ROLE_NAME) => {
                let now = SystemTime::now();
                let body = serde_json::json!({
                    "Code": "Success",
                    "LastUpdated": instant(now),
                    "Type": "AWS-HMAC",
                    "AccessKeyId": credentials.access_key_id,
                    "SecretAccessKey": credentials.secret_access_key,
                    "Token": credentials.session_token,
                    "Expiration": instant(now + EXPIRES_IN),
                });
                Answer { status: "200 OK", body: body.to_string(), ttl: None }
            }
            _ => Answer::status("404 Not Found"),
        }
    }
}

struct Answer {
    status: &'static str,
    body: String,
    ttl: Option<u64>,
}

impl Answer {
    fn status(status: &'static str) -> Self {
        Self { status, body: String::new(), ttl: None }
    }
}

/// Whole seconds, as EC2 writes them.
fn instant(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    time.replace_nanosecond(0).unwrap_or(time).format(&Rfc3339).unwrap_or_default()
}

async fn read_header(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut header = Vec::new();
    while !header.windows(4).any(|end| end == b"\r\n\r\n") {
        if header.len() > MAX_HEADER_BYTES || connection.read_buf(&mut header).await? == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use protocol::agent::Credentials;

    use super::*;

    async fn ask(metadata: &Metadata, request: &str) -> (String, String) {
        let (mut client, mut server) = tokio::io::duplex(1 << 16);
        client.write_all(request.as_bytes()).await.unwrap();
        metadata.serve(&mut server).await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn credentials_cost_a_token() {
        let metadata = Metadata::default();
        assert!(!metadata.has_role());
        let credentials = Credentials { access_key_id: "AKIA".to_owned(), secret_access_key: "secret".to_owned(), session_token: "session".to_owned() };
        metadata.set(Some(Role { credentials: Some(credentials) }));
        let put = |ttl: &str| format!("PUT /latest/api/token HTTP/1.1\r\nhost: x\r\nX-aws-ec2-metadata-token-ttl-seconds: {ttl}\r\n\r\n");
        for ttl in ["0", "21601", "soon", ""] {
            assert_eq!(ask(&metadata, &put(ttl)).await.0, "HTTP/1.1 400 Bad Request", "{ttl}");
        }
        let (status, token) = ask(&metadata, &put("21600")).await;
        assert_eq!((status.as_str(), token.len()), ("HTTP/1.1 200 OK", 64));
        let get = |path: &str, token: &str| format!("GET {path} HTTP/1.1\r\nx-aws-ec2-metadata-token: {token}\r\n\r\n");
        assert_eq!(ask(&metadata, &get(CREDENTIALS, "guessed")).await.0, "HTTP/1.1 401 Unauthorized");
        assert_eq!(ask(&metadata, &format!("GET {CREDENTIALS}/ HTTP/1.1\r\n\r\n")).await.0, "HTTP/1.1 401 Unauthorized");
        for path in [CREDENTIALS.to_owned(), format!("{CREDENTIALS}/")] {
            assert_eq!(ask(&metadata, &get(&path, &token)).await.1, "execution_role");
        }
        let (_, body) = ask(&metadata, &get(&format!("{CREDENTIALS}/execution_role"), &token)).await;
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&body["Code"], &body["AccessKeyId"], &body["SecretAccessKey"], &body["Token"]), (&"Success".into(), &"AKIA".into(), &"secret".into(), &"session".into()));
        for time in ["LastUpdated", "Expiration"] {
            assert!(OffsetDateTime::parse(body[time].as_str().unwrap(), &Rfc3339).is_ok(), "{time}");
        }
        for (request, status) in [
            (get(&format!("{CREDENTIALS}/other"), &token), "404 Not Found"),
            (get("/latest/user-data", &token), "404 Not Found"),
            ("POST / HTTP/1.1\r\n\r\n".to_owned(), "405 Method Not Allowed"),
            (format!("PUT /latest/api/token HTTP/1.1\r\nx-forwarded-for: 1.2.3.4\r\n{TTL_FIELD}: 60\r\n\r\n"), "403 Forbidden"),
            ("rubbish\r\n\r\n".to_owned(), "400 Bad Request"),
        ] {
            assert_eq!(ask(&metadata, &request).await.0, format!("HTTP/1.1 {status}"), "{request}");
        }
        // A role that the operator has given nothing.
        metadata.set(Some(Role { credentials: None }));
        assert_eq!(ask(&metadata, &get(CREDENTIALS, &token)).await.0, "HTTP/1.1 404 Not Found");
    }
}
