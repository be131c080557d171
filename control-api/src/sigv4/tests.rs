//! AWS's published test vectors, signatures made by botocore, and everything that must not pass.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{Expected, MAX_SKEW, Signed, begin, canonical, claimed_service};
use crate::reply::ErrorKind;

const ID: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
/// 20150830T123600Z, the instant of AWS's test suite.
const INSTANT: u64 = 1_440_938_160;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())).collect()
}

struct Vector<'a> {
    method: &'a str,
    path: &'a str,
    query: &'a str,
    headers: &'a [(&'a str, &'a str)],
    body: &'a str,
    signed_headers: &'a str,
    signature: &'a str,
}

impl Vector<'_> {
    fn check(&self, service: &str, now: SystemTime) -> Result<String, ErrorKind> {
        let mut headers = headers(self.headers);
        if !self.signature.is_empty() {
            let date = headers.get("x-amz-date").map_or("20150830T123600Z", |date| date.to_str().unwrap()).to_owned();
            let authorization = format!(
                "AWS4-HMAC-SHA256 Credential={ID}/{}/us-east-1/{service}/aws4_request, SignedHeaders={}, Signature={}",
                &date[..8],
                self.signed_headers,
                self.signature
            );
            headers.insert("authorization", authorization.parse().unwrap());
        }
        verify_with(self, &headers, service, now)
    }
}

fn verify_with(vector: &Vector<'_>, headers: &HeaderMap, service: &str, now: SystemTime) -> Result<String, ErrorKind> {
    let request = Signed {
        method: vector.method,
        path: vector.path,
        query: vector.query,
        headers,
        authority: None,
    };
    let secret = |id: &str| (id == ID).then(|| SECRET.to_owned());
    let pending = begin(&request, &Expected { region: "us-east-1", service, now, secret: &secret }).map_err(|error| error.kind)?;
    pending.finish(vector.body.as_bytes()).map(|verified| verified.id).map_err(|error| error.kind)
}

fn instant() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(INSTANT)
}

const HOST: (&str, &str) = ("host", "example.amazonaws.com");
const DATE: (&str, &str) = ("x-amz-date", "20150830T123600Z");

/// From the suite that AWS publishes as `aws-sig-v4-test-suite`.
#[test]
fn the_published_vectors_verify() {
    let plain: &[_] = &[HOST, DATE];
    let v = |method, path, query, headers, signed_headers, signature| Vector { method, path, query, headers, body: "", signed_headers, signature };
    let both = "host;x-amz-date";
    for vector in [
        v("GET", "/", "", plain, both, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        v("GET", "/", "Param2=value2&Param1=value1", plain, both, "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500"),
        v("GET", "/", "Param1=value1", plain, both, "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb"),
        v("GET", "/ሴ", "", plain, both, "8318018e0b0f223aa2bbf98705b62bb787dc9c0e678f255a891fd03141be5d85"),
        v("GET", "/", "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz=-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", plain, both, "9c3e54bfcdf0b19771a7f523ee5669cdf59bc7cc0884027167c21bb143a40197"),
        v("GET", "/-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "", plain, both, "07ef7494c76fa4850883e2b006601f940f8a34d404d0cfa977f52a65bbf5f24f"),
        v("GET", "/example space/", "", plain, both, "652487583200325589f1fba4c7e578f72c47cb61beeca81406b39ddec1366741"),
        v("GET", "/example/..", "", plain, both, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        v("GET", "//", "", plain, both, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        v("GET", "/./", "", plain, both, "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31"),
        v("POST", "/", "", plain, both, "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
        v("POST", "/", "", &[HOST, ("my-header1", "value1"), DATE], "host;my-header1;x-amz-date", "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c"),
        v("GET", "/", "", &[HOST, ("my-header1", "value2"), ("my-header1", "value2"), ("my-header1", "value1"), DATE], "host;my-header1;x-amz-date", "c9d5ea9f3f72853aea855b47ea873832890dbdd183b4468f858259531a5138ea"),
        v("GET", "/", "", &[HOST, ("my-header1", "value4"), ("my-header1", "value1"), ("my-header1", "value3"), ("my-header1", "value2"), DATE], "host;my-header1;x-amz-date", "08c7e5a9acfcfeb3ab6b2185e75ce8b1deb5e634ec47601a50643f830c755c01"),
        v("GET", "/", "", &[HOST, ("my-header1", " value1"), ("my-header2", " \"a   b   c\""), DATE], "host;my-header1;my-header2;x-amz-date", "acc3ed3afb60bb290fc8d2dd0098b9911fcaa05412b367055dee359757a9c736"),
    ] {
        assert_eq!(vector.check("service", instant()), Ok(ID.to_owned()), "{} {}?{}", vector.method, vector.path, vector.query);
    }
    let form = Vector {
        method: "POST",
        path: "/",
        query: "",
        headers: &[("content-type", "application/x-www-form-urlencoded"), HOST, DATE],
        body: "Param1=value1",
        signed_headers: "content-type;host;x-amz-date",
        signature: "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
    };
    assert_eq!(form.check("service", instant()), Ok(ID.to_owned()));
}

const LOOPBACK: (&str, &str) = ("host", "127.0.0.1:9000");
const LIST: &str = "/2025-09-09/microvms";

fn run() -> Vector<'static> {
    Vector {
        method: "POST",
        path: LIST,
        query: "",
        headers: &[("content-type", "application/json"), LOOPBACK, DATE],
        body: r#"{"imageIdentifier": "hello"}"#,
        signed_headers: "content-type;host;x-amz-date",
        signature: "c017a19e98290aebebb4e09b55661c2d55a7d94280e50e3c35d52365d218fec7",
    }
}

/// Signed by botocore 1.44.5: the paths, queries and bodies this API meets.
#[test]
fn what_botocore_signs_verifies() {
    let get = |path, query, signature| Vector { method: "GET", path, query, headers: &[LOOPBACK, DATE], body: "", signed_headers: "host;x-amz-date", signature };
    for vector in [
        get("/2025-09-09/microvm-images/arn%3Aaws%3Alambda%3Aus-east-1%3A000000000000%3Amicrovm-image%3Ahello", "", "c64873f62cf4f142f04919a3e97f2636a9814b2b469e4bcb188f54de8969e530"),
        get("/2025-09-09/microvm-images/arn:aws:lambda:us-east-1:000000000000:microvm-image:hello", "", "4fda6d5fd87d4b5fb0a4186864cd1d159c56ce98435c0fd7c08916f358e9fc03"),
        get(LIST, "maxResults=2&nextToken=a%2Bb%3D%3D&imageIdentifier=arn%3Aaws", "fade5881cb7b8dec5f7e1fe8f8509255e4f411c8c8fb2c03e90626a05250dd6c"),
        get("/2017-03-31/tags/x", "tagKeys=b&tagKeys=a&tagKeys=B", "6fdca930cd342c714d16c1aaada5873ddb45ec93525b58f0574e961fe3e46563"),
        run(),
    ] {
        assert_eq!(vector.check("lambda", instant()), Ok(ID.to_owned()), "{} {}?{}", vector.method, vector.path, vector.query);
    }
}

#[test]
fn anything_changed_after_signing_is_refused() {
    let mismatch = Err(ErrorKind::InvalidSignature);
    for (what, vector) in [
        ("method", Vector { method: "PUT", ..run() }),
        ("path", Vector { path: "/2025-09-09/microvm", ..run() }),
        ("query", Vector { query: "a=b", ..run() }),
        ("body", Vector { body: r#"{"imageIdentifier": "hellO"}"#, ..run() }),
        ("host", Vector { headers: &[("content-type", "application/json"), ("host", "127.0.0.1:9001"), DATE], ..run() }),
        ("signed header", Vector { headers: &[("content-type", "text/plain"), LOOPBACK, DATE], ..run() }),
        ("signature cut", Vector { signature: "c017a19e98290aebebb4e09b55661c2d55a7d94280e50e3c35d52365d218fec", ..run() }),
        ("signature in upper case", Vector { signature: "C017A19E98290AEBEBB4E09B55661C2D55A7D94280E50E3C35D52365D218FEC7", ..run() }),
        ("hash told wrong", Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-content-sha256", "0000")], ..run() }),
        ("hash of another body", Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-content-sha256", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")], ..run() }),
        ("hash cut off", Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-content-sha256", "e3b0c44298fc1c14")], ..run() }),
        ("body in signed pieces", Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-content-sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD")], ..run() }),
        ("payload unsigned", Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-content-sha256", "UNSIGNED-PAYLOAD")], ..run() }),
        ("a second before", Vector { headers: &[("content-type", "application/json"), LOOPBACK, ("x-amz-date", "20150830T123559Z")], ..run() }),
    ] {
        assert_eq!(vector.check("lambda", instant()), mismatch, "{what}");
    }
    assert_eq!(run().check("lambda", instant()), Ok(ID.to_owned()));
    assert_eq!(run().check("s3", instant()), Err(ErrorKind::InvalidSignature), "another service");
    let session = Vector { headers: &[("content-type", "application/json"), LOOPBACK, DATE, ("x-amz-security-token", "x")], ..run() };
    assert_eq!(session.check("lambda", instant()), Err(ErrorKind::UnrecognizedClient));
    let unsigned_host = Vector { signed_headers: "content-type;x-amz-date", ..run() };
    assert_eq!(unsigned_host.check("lambda", instant()), Err(ErrorKind::IncompleteSignature));
    let absent = Vector { signed_headers: "content-type;host;x-amz-date;x-other", ..run() };
    assert_eq!(absent.check("lambda", instant()), Err(ErrorKind::IncompleteSignature));
}

#[test]
fn a_signature_holds_for_five_minutes_either_way() {
    let skew = Duration::from_secs(5 * 60);
    assert_eq!(MAX_SKEW, skew);
    let second = Duration::from_secs(1);
    for (now, expected) in [
        (instant() + skew, Ok(ID.to_owned())),
        (instant() - skew, Ok(ID.to_owned())),
        (instant() + skew + second, Err(ErrorKind::InvalidSignature)),
        (instant() - skew - second, Err(ErrorKind::InvalidSignature)),
    ] {
        assert_eq!(run().check("lambda", now), expected);
    }
}

#[test]
fn authorization_headers_that_are_not_right_are_refused_without_a_panic() {
    use ErrorKind::{IncompleteSignature, InvalidSignature, MissingAuthenticationToken, UnrecognizedClient};
    let good = format!(
        "AWS4-HMAC-SHA256 Credential={ID}/20150830/us-east-1/lambda/aws4_request, SignedHeaders=content-type;host;x-amz-date, Signature={}",
        run().signature
    );
    let check = |authorization: &str| {
        let mut headers = headers(run().headers);
        headers.insert("authorization", HeaderValue::from_bytes(authorization.as_bytes()).unwrap());
        verify_with(&run(), &headers, "lambda", instant())
    };
    assert_eq!(check(&good), Ok(ID.to_owned()));
    assert_eq!(check(&good.replace(", ", ",")), Ok(ID.to_owned()), "no blanks between the parameters");
    for (authorization, expected) in [
        (String::new(), IncompleteSignature),
        ("Bearer x".to_owned(), IncompleteSignature),
        ("Basic dXNlcjpwYXNz".to_owned(), IncompleteSignature),
        ("AWS4-HMAC-SHA256".to_owned(), IncompleteSignature),
        ("AWS4-HMAC-SHA256 ".to_owned(), IncompleteSignature),
        ("AWS4-HMAC-SHA256 Credential=x".to_owned(), IncompleteSignature),
        (good.replace("SHA256", "SHA1"), IncompleteSignature),
        (good.replace("/aws4_request", ""), IncompleteSignature),
        (good.replace("/aws4_request", "/aws5_request"), InvalidSignature),
        (good.replace("us-east-1", "us-west-2"), InvalidSignature),
        (good.replace("20150830", "20150829"), InvalidSignature),
        (good.replace("20150830", "ä"), InvalidSignature),
        (good.replace(ID, "AKIDOTHER"), UnrecognizedClient),
        (format!("{good}, Signature=0"), IncompleteSignature),
        (format!("{good}, Extra=0"), IncompleteSignature),
        (good.replace("content-type;host", "host;content-type"), IncompleteSignature),
        (good.replace("host", "Host"), IncompleteSignature),
    ] {
        let refused = check(&authorization).unwrap_err();
        // Text outside ASCII is no header text at all; either word is right for it.
        assert!(refused == expected || (!authorization.is_ascii() && refused == IncompleteSignature), "{authorization}: {refused:?}");
    }
    assert_eq!(verify_with(&run(), &headers(run().headers), "lambda", instant()), Err(MissingAuthenticationToken));
    for date in ["", "2015", "20150830T123600", "20150830T123600Zz", "20151330T123600Z", "2015-08-30T12:36Z", "99999999T999999Z"] {
        let mut headers = headers(&[("content-type", "application/json"), LOOPBACK, ("x-amz-date", date)]);
        headers.insert("authorization", good.parse().unwrap());
        let refused = verify_with(&run(), &headers, "lambda", instant()).unwrap_err();
        assert!(matches!(refused, IncompleteSignature | InvalidSignature), "{date}");
    }
    let mut twice = headers(run().headers);
    twice.append("authorization", good.parse().unwrap());
    twice.append("authorization", good.parse().unwrap());
    assert_eq!(verify_with(&run(), &twice, "lambda", instant()), Err(IncompleteSignature));
}

/// Made by botocore's SigV4QueryAuth.
const PRESIGNED: &str = "maxResults=2&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIDEXAMPLE%2F20150830%2Fus-east-1%2Flambda%2Faws4_request&\
X-Amz-Date=20150830T123600Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host&X-Amz-Signature=f75fedd64c9f4231f3c7ed7a80f626d924187f4c6fb1b4a88a2d3fb2906743f1";

#[test]
fn a_presigned_query_holds_until_it_expires() {
    let check = |query: &str, now| {
        let vector = Vector { method: "GET", path: LIST, query, headers: &[LOOPBACK], body: "", signed_headers: "", signature: "" };
        verify_with(&vector, &headers(&[LOOPBACK]), "lambda", now)
    };
    assert_eq!(check(PRESIGNED, instant()), Ok(ID.to_owned()));
    assert_eq!(check(PRESIGNED, instant() + Duration::from_secs(900)), Ok(ID.to_owned()));
    let late = Err(ErrorKind::InvalidSignature);
    assert_eq!(check(PRESIGNED, instant() + Duration::from_secs(901)), late);
    for (from, to, expected) in [
        ("maxResults=2", "maxResults=3", ErrorKind::InvalidSignature),
        ("Expires=900", "Expires=901", ErrorKind::InvalidSignature),
        ("Expires=900", "Expires=604801", ErrorKind::IncompleteSignature),
        ("Expires=900", "Expires=0", ErrorKind::IncompleteSignature),
        ("Expires=900", "Expires=-1", ErrorKind::IncompleteSignature),
        ("&X-Amz-Expires=900", "", ErrorKind::IncompleteSignature),
        ("X-Amz-SignedHeaders=host", "X-Amz-SignedHeaders=", ErrorKind::IncompleteSignature),
        ("HMAC-SHA256", "HMAC-SHA1", ErrorKind::IncompleteSignature),
        ("maxResults=2", "X-Amz-Date=20150830T123600Z", ErrorKind::IncompleteSignature),
        ("maxResults=2", "X-Amz-Security-Token=x", ErrorKind::UnrecognizedClient),
    ] {
        assert_eq!(check(&PRESIGNED.replace(from, to), instant()), Err(expected), "{from} -> {to}");
    }
}

#[test]
fn the_claimed_service_is_read_from_header_and_query() {
    let authorization = |text: &str| headers(&[("authorization", text)]);
    for (headers, query, expected) in [
        (authorization("AWS4-HMAC-SHA256 Credential=A/20150830/r/s3/aws4_request, SignedHeaders=host, Signature=0"), "", Some("s3")),
        (authorization("AWS4-HMAC-SHA256 SignedHeaders=host,Credential=A/20150830/r/lambda/aws4_request"), "", Some("lambda")),
        (HeaderMap::new(), "X-Amz-Credential=A%2F20150830%2Fr%2Fs3%2Faws4_request", Some("s3")),
        (HeaderMap::new(), "", None),
        (authorization("Bearer s3"), "", None),
        (authorization("Credential="), "", None),
    ] {
        assert_eq!(claimed_service(&headers, query).as_deref(), expected);
    }
}

#[test]
fn canonical_queries_are_sorted_after_encoding() {
    for (raw, expected) in [
        ("", ""),
        ("b=2&a=1", "a=1&b=2"),
        ("a=2&a=10&a=1", "a=1&a=10&a=2"),
        ("a", "a="),
        ("a=b=c", "a=b%3Dc"),
        ("a=%7e%2f%20+", "a=~%2F%20%2B"),
        ("&&a=1&", "a=1"),
        ("a=%zz&b=%", "a=%25zz&b=%25"),
    ] {
        assert_eq!(canonical::query(raw), expected, "{raw}");
    }
    for (raw, expected) in [("", "/"), ("/", "/"), ("/a/./b/../c//d/", "/a/c/d/"), ("/..", "/"), ("/%3A:", "/%253A%3A")] {
        assert_eq!(canonical::path(raw), expected, "{raw}");
    }
}

/// Without the body nothing is known of it; with its hash told, the signature is judged before a byte of it is read.
#[test]
fn the_header_alone_refuses_what_it_can() {
    let hash = "01ba4719c80b6fe911b091a7c05124b64eeece964e09c058ef8f9805daca546b";
    let good = run();
    let untold = headers(good.headers);
    let pending = |headers: &HeaderMap, id: &str, now| {
        let request = Signed { method: good.method, path: good.path, query: "", headers, authority: None };
        let secret = |known: &str| (known == id).then(|| SECRET.to_owned());
        begin(&request, &Expected { region: "us-east-1", service: "lambda", now, secret: &secret }).map(|_| ()).map_err(|error| error.kind)
    };
    assert_eq!(pending(&untold, ID, instant()), Err(ErrorKind::MissingAuthenticationToken));
    let mut signed = untold.clone();
    let authorization = format!("AWS4-HMAC-SHA256 Credential={ID}/20150830/us-east-1/lambda/aws4_request, SignedHeaders={}, Signature=", good.signed_headers);
    signed.insert("authorization", format!("{authorization}{}", "0".repeat(64)).parse().unwrap());
    assert_eq!(pending(&signed, ID, instant()), Ok(()), "a signature that only the body could show to be wrong");
    assert_eq!(pending(&signed, "AKIDOTHER", instant()), Err(ErrorKind::UnrecognizedClient));
    assert_eq!(pending(&signed, ID, instant() + Duration::from_secs(3_600)), Err(ErrorKind::InvalidSignature));
    signed.insert("x-amz-content-sha256", hash.parse().unwrap());
    assert_eq!(pending(&signed, ID, instant()), Err(ErrorKind::InvalidSignature));
    signed.append("x-amz-content-sha256", hash.parse().unwrap());
    assert_eq!(pending(&signed, ID, instant()), Err(ErrorKind::IncompleteSignature));
}
