//! Every way to be refused that cases.md A names, and the few ways to be let in.

mod vectors;

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use josekit::jwe::{Dir, JweContentEncryption as _, JweHeader, enc::A256GCM};
use model::{MicrovmId, Port, PortRange, PortScope};
use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

use crate::{Claims, KeyRing, MAX_PORT_RANGES, MAX_TOKEN_CHARS, Refusal, jwe};

const NOW: u64 = 1_790_000_000;

/// RFC 7520 §5.6, and its key: somebody else's direct encryption.
const RFC_7520_DIR: (&str, &str) = (
    concat!(
        "eyJhbGciOiJkaXIiLCJraWQiOiI3N2M3ZTJiOC02ZTEzLTQ1Y2YtODY3Mi02MTdiNWI0NTI0M2EiLCJlbmMiOiJBMTI4R0NNIn0..refa467QzzKx6QAB.",
        "JW_i_f52hww_ELQPGaYyeAB6HYGcR559l9TYnSovc23XJoBcW29rHP8yZOZG7YhLpT1bjFuvZPjQS-m0IFtVcXkZXdH_lr_FrdYt9HRUYkshtrMmIUAyGmUn",
        "d9zMDB2n0cRDIHAzFVeJUDxkUwVAE7_YGRPdcqMyiBoCO-FBdE-Nceb4h3-FtBP-c_BIwCPTjb9o0SbdcdREEMJMyZBH8ySWMVi1gPD9yxi-aQpGbSv_F9N4",
        "IZAxscj5g-NJsUPbjk29-s7LJAGb15wEBtXphVCgyy53CoIKLHHeJHXex45Uz9aKZSRSInZI-wjsY0yu3cT4_aQ3i1o-tiE-F8Ios61EKgyIQ4CWao8PFMj8",
        "TTnp",
        ".vbb32Xvllea2OtmHAdccRQ"
    ),
    "XctOhJAkA-pD9Lh7ZgW_2A",
);

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

fn scope(ranges: &[(u16, u16)]) -> PortScope {
    PortScope::Ranges(ranges.iter().map(|&(first, last)| PortRange { first: port(first), last: port(last) }).collect())
}

fn claims(ports: PortScope) -> Claims {
    Claims { microvm: MicrovmId::random(), ports, shell: false, issued_at: at(NOW), expires_at: at(NOW + 900) }
}

/// A ring in a directory of its own, with its one key known to the test.
struct Bench {
    dir: tempfile::TempDir,
    ring: KeyRing,
    kid: Uuid,
    secret: [u8; 32],
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ring = KeyRing::open_or_create(&dir.path().join("keys.json")).unwrap();
        let saved: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("keys.json")).unwrap()).unwrap();
        let key = &saved["keys"][0];
        let secret = URL_SAFE_NO_PAD.decode(key["k"].as_str().unwrap()).unwrap().try_into().unwrap();
        Self { kid: key["kid"].as_str().unwrap().parse().unwrap(), dir, ring, secret }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("keys.json")
    }

    /// A token with a fitting tag over any plaintext.
    fn sealed(&self, plaintext: &[u8]) -> String {
        jwe::encrypt(&self.secret, &jwe::header(&self.kid), plaintext)
    }

    fn open(&self, token: &str) -> Result<Claims, Refusal> {
        self.ring.open(token, at(NOW))
    }
}

fn parts(token: &str) -> [String; 5] {
    token.split('.').map(str::to_owned).collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn what_is_minted_opens_with_the_same_claims() {
    let bench = Bench::new();
    for ports in [PortScope::All, scope(&[]), scope(&[(8080, 8080)]), scope(&[(3000, 3005), (80, 80)])] {
        for shell in [false, true] {
            let claims = Claims { shell, ..claims(ports.clone()) };
            assert_eq!(bench.open(&bench.ring.mint(&claims)), Ok(claims));
        }
    }
}

#[test]
fn a_token_has_the_form_that_was_seen_at_aws() {
    let bench = Bench::new();
    let lengths: Vec<usize> = [PortScope::All, scope(&[(1, 1)]), scope(&[(60_000, 65_535); 20])]
        .map(|ports| bench.ring.mint(&claims(ports)).len())
        .into();
    assert_eq!(lengths, [lengths[0]; 3], "the length tells nothing about the ports");
    assert!((751..=899).contains(&lengths[0]), "{lengths:?}");
    let [header, key, iv, _, tag] = parts(&bench.ring.mint(&claims(PortScope::All)));
    let header = String::from_utf8(URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
    assert_eq!(header, format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, bench.kid));
    assert_eq!((key.len(), iv.len(), tag.len()), (0, 16, 22));
}

#[test]
fn another_jwe_reader_opens_our_token_and_we_open_its() {
    let bench = Bench::new();
    let token = bench.ring.mint(&claims(PortScope::All));
    let (plaintext, header) = josekit::jwe::deserialize_compact(&token, &Dir.decrypter_from_bytes(bench.secret).unwrap()).unwrap();
    assert_eq!(header.key_id(), Some(bench.kid.to_string().as_str()));
    // josekit writes the members in the order in which they were set: ours, and the sorted one.
    for members in [["kid", "alg", "enc"], ["alg", "enc", "kid"]] {
        let mut header = JweHeader::new();
        for member in members {
            let value = match member {
                "kid" => bench.kid.to_string(),
                "alg" => "dir".to_owned(),
                _ => "A256GCM".to_owned(),
            };
            header.set_claim(member, Some(value.into())).unwrap();
        }
        let theirs = josekit::jwe::serialize_compact(&plaintext, &header, &Dir.encrypter_from_bytes(bench.secret).unwrap()).unwrap();
        assert_eq!(bench.open(&theirs), bench.open(&token), "{members:?}");
        assert!(bench.open(&theirs).is_ok());
    }
}

/// cases.md 2, 11, 13: whatever is not `<header of a ring's key>..iv.ciphertext.tag` never reaches a key.
#[test]
fn what_is_not_a_token_of_ours_is_refused_by_its_form() {
    use Refusal::{UnknownKey, Unreadable};
    let bench = Bench::new();
    let good = bench.ring.mint(&claims(PortScope::All));
    let [header, _, iv, text, tag] = parts(&good);
    let stranger = |json: String| format!("{}..{iv}.{text}.{tag}", URL_SAFE_NO_PAD.encode(json));
    let kid = bench.kid;
    for (what, token, expected) in [
        ("empty", String::new(), Unreadable),
        ("dots", "....".to_owned(), Unreadable),
        ("a word", "garbage".to_owned(), Unreadable),
        ("three parts (JWS)", format!("{header}.{text}.{tag}"), Unreadable),
        ("four parts", format!("{header}..{iv}.{text}"), Unreadable),
        ("six parts", format!("{good}."), Unreadable),
        ("padding", format!("{good}=="), Unreadable),
        ("leading blank", format!(" {good}"), Unreadable),
        ("trailing newline", format!("{good}\n"), Unreadable),
        ("inner tab", good.replacen('.', "\t.", 1), Unreadable),
        ("NUL", format!("{good}\0"), Unreadable),
        ("non-ASCII", format!("{good}ä"), Unreadable),
        ("standard base64 letters", format!("{}+/", &good[..good.len() - 2]), Unreadable),
        ("JSON serialisation", format!(r#"{{"protected":"{header}","iv":"{iv}","ciphertext":"{text}","tag":"{tag}"}}"#), Unreadable),
        ("token twice", format!("{good},{good}"), Unreadable),
        ("unknown kid", stranger(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, Uuid::new_v4())), UnknownKey),
        ("no kid", stranger(r#"{"alg":"dir","enc":"A256GCM"}"#.to_owned()), UnknownKey),
        ("kid is a path", stranger(r#"{"kid":"../x","alg":"dir","enc":"A256GCM"}"#.to_owned()), UnknownKey),
        ("kid with NUL", stranger(format!(r#"{{"kid":"{kid}\u0000","alg":"dir","enc":"A256GCM"}}"#)), UnknownKey),
        ("kid of 3 kB", stranger(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, "x".repeat(3_000))), UnknownKey),
        ("kid of 10 kB", stranger(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, "x".repeat(10_000))), Unreadable),
        ("kid in upper case", stranger(format!(r#"{{"kid":"{}","alg":"dir","enc":"A256GCM"}}"#, kid.to_string().to_uppercase())), UnknownKey),
        ("other order", stranger(format!(r#"{{"alg":"dir","kid":"{kid}","enc":"A256GCM"}}"#)), UnknownKey),
        ("the sorted order of other members", stranger(format!(r#"{{"alg":"dir","enc":"A256GCM","kid":"{kid}","zip":"DEF"}}"#)), UnknownKey),
        ("blank in the header", stranger(format!(r#"{{"kid":"{kid}", "alg":"dir","enc":"A256GCM"}}"#)), UnknownKey),
        ("alg none", stranger(format!(r#"{{"kid":"{kid}","alg":"none","enc":"A256GCM"}}"#)), UnknownKey),
        ("alg A256KW", stranger(format!(r#"{{"kid":"{kid}","alg":"A256KW","enc":"A256GCM"}}"#)), UnknownKey),
        ("alg RSA1_5", stranger(format!(r#"{{"kid":"{kid}","alg":"RSA1_5","enc":"A256GCM"}}"#)), UnknownKey),
        ("alg ECDH-ES", stranger(format!(r#"{{"kid":"{kid}","alg":"ECDH-ES","enc":"A256GCM","epk":{{}}}}"#)), UnknownKey),
        ("PBES2", stranger(format!(r#"{{"kid":"{kid}","alg":"PBES2-HS256+A128KW","enc":"A256GCM","p2c":2147483648,"p2s":"eA"}}"#)), UnknownKey),
        ("enc A128GCM", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A128GCM"}}"#)), UnknownKey),
        ("enc A256CBC-HS512", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256CBC-HS512"}}"#)), UnknownKey),
        ("zip", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256GCM","zip":"DEF"}}"#)), UnknownKey),
        ("crit", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256GCM","crit":["exp"]}}"#)), UnknownKey),
        ("doubled member", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256GCM","enc":"A256GCM"}}"#)), UnknownKey),
        ("jku", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256GCM","jku":"http://127.0.0.1/"}}"#)), UnknownKey),
        ("jwk", stranger(format!(r#"{{"kid":"{kid}","alg":"dir","enc":"A256GCM","jwk":{{"kty":"oct","k":"AA"}}}}"#)), UnknownKey),
        ("RFC 7520 5.6", RFC_7520_DIR.0.to_owned(), UnknownKey),
    ] {
        assert_eq!(bench.open(&token), Err(expected), "{what}");
    }
}

/// cases.md 11, 12: tokens that josekit itself would open with our key, made by its own writer.
#[test]
fn well_made_tokens_of_another_algorithm_are_refused() {
    let bench = Bench::new();
    let plaintext = claims(PortScope::All).to_json();
    for (enc, zip) in [("A256GCM", Some("DEF")), ("A128CBC-HS256", None)] {
        let mut header = JweHeader::new();
        header.set_key_id(bench.kid.to_string());
        header.set_algorithm("dir");
        header.set_content_encryption(enc);
        if let Some(zip) = zip {
            header.set_compression(zip);
        }
        let token = josekit::jwe::serialize_compact(&plaintext, &header, &Dir.encrypter_from_bytes(bench.secret).unwrap()).unwrap();
        assert!(josekit::jwe::deserialize_compact(&token, &Dir.decrypter_from_bytes(bench.secret).unwrap()).is_ok());
        assert_eq!(bench.open(&token), Err(Refusal::UnknownKey), "{enc} {zip:?}");
    }
    let (token, key) = RFC_7520_DIR;
    let opened = josekit::jwe::deserialize_compact(token, &Dir.decrypter_from_bytes(URL_SAFE_NO_PAD.decode(key).unwrap()).unwrap());
    assert!(opened.unwrap().0.starts_with(b"You can trust us"));
    assert_eq!(bench.open(token), Err(Refusal::UnknownKey));
}

/// cases.md 14.
#[test]
fn parts_of_a_wrong_size_are_refused_before_the_cipher() {
    let bench = Bench::new();
    let plaintext = claims(PortScope::All).to_json();
    let header = jwe::header(&bench.kid);
    let good = bench.sealed(&plaintext);
    let [_, _, iv, text, tag] = parts(&good);
    assert!(bench.open(&good).is_ok());
    // OpenSSL and josekit take every one of these tags from 1 to 15 bytes.
    let tag_bytes = URL_SAFE_NO_PAD.decode(&tag).unwrap();
    for length in 0..16 {
        let tag = URL_SAFE_NO_PAD.encode(&tag_bytes[..length]);
        assert_eq!(bench.open(&format!("{header}..{iv}.{text}.{tag}")), Err(Refusal::NotAuthentic), "tag of {length}");
    }
    for length in 0..tag.len() {
        assert_eq!(bench.open(&format!("{header}..{iv}.{text}.{}", &tag[..length])), Err(Refusal::NotAuthentic), "tag of {length} letters");
    }
    assert_eq!(bench.open(&format!("{header}..{iv}.{text}.{tag}A")), Err(Refusal::NotAuthentic));
    // Well encrypted under an IV of another length.
    for length in [1, 8, 11, 13, 16, 32] {
        let iv = vec![7; length];
        let (text, tag) = A256GCM.encrypt(&bench.secret, Some(&iv), &plaintext, header.as_bytes()).unwrap();
        let token = format!("{header}..{}.{}.{}", URL_SAFE_NO_PAD.encode(&iv), URL_SAFE_NO_PAD.encode(text), URL_SAFE_NO_PAD.encode(tag.unwrap()));
        assert_eq!(bench.open(&token), Err(Refusal::NotAuthentic), "IV of {length}");
    }
    assert_eq!(bench.open(&format!("{header}...{text}.{tag}")), Err(Refusal::NotAuthentic), "empty IV");
    assert_eq!(bench.open(&format!("{header}.AAAA.{iv}.{text}.{tag}")), Err(Refusal::NotAuthentic), "key part");
    assert_eq!(bench.open(&bench.sealed(b"")), Err(Refusal::NotAuthentic), "empty ciphertext");
    assert_eq!(bench.open(&format!("{header}..{iv}.A.{tag}")), Err(Refusal::NotAuthentic), "half a byte");
}

#[test]
fn every_part_has_one_spelling() {
    let bench = Bench::new();
    // 512 bytes of ciphertext and 16 of tag leave four spare bits each: the last letter has 15 more spellings.
    let good = bench.ring.mint(&claims(PortScope::All));
    let [header, _, iv, text, tag] = parts(&good);
    let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    for letter in letters.chars() {
        for (token, same) in [
            (format!("{header}..{iv}.{text}.{}{letter}", &tag[..21]), tag.ends_with(letter)),
            (format!("{header}..{iv}.{}{letter}.{tag}", &text[..text.len() - 1]), text.ends_with(letter)),
        ] {
            assert_eq!(bench.open(&token).is_ok(), same, "{letter}");
        }
    }
}

#[test]
fn one_flipped_bit_anywhere_is_refused() {
    let bench = Bench::new();
    let good = bench.ring.mint(&claims(PortScope::All));
    for place in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone().into_bytes();
            bytes[place] ^= 1 << bit;
            if let Ok(token) = String::from_utf8(bytes) {
                assert!(bench.open(&token).is_err(), "byte {place}, bit {bit}");
            }
        }
    }
}

/// cases.md 8, 10: the content must be exactly claims, and its time must be now.
#[test]
fn claims_are_read_strictly_and_against_the_clock() {
    use Refusal::{Expired, NotAuthentic, NotYetValid};
    let bench = Bench::new();
    let good = json!({"sub": MicrovmId::random(), "ports": "all", "shell": false, "iat": NOW, "exp": NOW + 60, "pad": ""});
    let with = |member: &str, value: serde_json::Value| {
        let mut changed = good.clone();
        changed[member] = value;
        bench.open(&bench.sealed(changed.to_string().as_bytes())).map(|_| ())
    };
    let without = |member: &str| {
        let mut changed = good.clone();
        changed.as_object_mut().unwrap().remove(member);
        bench.open(&bench.sealed(changed.to_string().as_bytes())).map(|_| ())
    };
    assert_eq!(with("pad", json!("   ")), Ok(()));
    for member in ["sub", "ports", "shell", "iat", "exp", "pad"] {
        assert_eq!(without(member), Err(NotAuthentic), "{member}");
        assert_eq!(with(member, json!(null)), Err(NotAuthentic), "{member}");
    }
    let hour = 3_600;
    for (member, value, expected) in [
        ("exp", json!(NOW + hour), Ok(())),
        ("exp", json!(NOW + 1), Ok(())),
        ("exp", json!(NOW), Err(Expired)),
        ("exp", json!(NOW + hour + 1), Err(NotAuthentic)),
        ("exp", json!(NOW - 1), Err(NotAuthentic)),
        ("exp", json!((NOW + 60).to_string()), Err(NotAuthentic)),
        ("exp", json!(NOW as f64 + 60.0), Err(NotAuthentic)),
        ("exp", json!(-1), Err(NotAuthentic)),
        ("exp", json!(1_u64 << 63), Err(NotAuthentic)),
        ("exp", json!(u64::MAX), Err(NotAuthentic)),
        ("exp", json!(true), Err(NotAuthentic)),
        ("iat", json!(NOW + 1), Err(NotYetValid)),
        ("iat", json!(0), Err(NotAuthentic)),
        ("iat", json!(NOW as f64), Err(NotAuthentic)),
        ("sub", json!("microvm-1"), Err(NotAuthentic)),
        ("shell", json!(0), Err(NotAuthentic)),
        ("ports", json!("All"), Err(NotAuthentic)),
        ("ports", json!({"ranges": [[1, 65535]]}), Ok(())),
        ("ports", json!({"ranges": [[0, 5]]}), Err(NotAuthentic)),
        ("ports", json!({"ranges": [[5, 4]]}), Err(NotAuthentic)),
        ("ports", json!({"ranges": [[1, 65536]]}), Err(NotAuthentic)),
        ("extra", json!(1), Err(NotAuthentic)),
    ] {
        assert_eq!(with(member, value.clone()), expected, "{member} = {value}");
    }
    let doubled = good.to_string().replacen('{', r#"{"shell":true,"#, 1);
    assert_eq!(bench.open(&bench.sealed(doubled.as_bytes())), Err(NotAuthentic));
    let twice = format!("{good}{good}");
    assert_eq!(bench.open(&bench.sealed(twice.as_bytes())), Err(NotAuthentic));
}

#[test]
fn times_near_the_end_of_numbers_do_not_panic() {
    let bench = Bench::new();
    for (iat, exp) in [(0, u64::MAX), (u64::MAX, u64::MAX), (u64::MAX - 60, u64::MAX), (i64::MAX as u64, i64::MAX as u64 + 60)] {
        let plaintext = json!({"sub": MicrovmId::random(), "ports": "all", "shell": false, "iat": iat, "exp": exp, "pad": ""}).to_string();
        assert!(bench.open(&bench.sealed(plaintext.as_bytes())).is_err(), "{iat} {exp}");
    }
}

#[test]
fn a_token_dies_at_its_instant_and_skew_reaches_only_forward() {
    let bench = Bench::new();
    let token = bench.ring.mint(&claims(PortScope::All));
    let end = at(NOW + 900);
    assert!(bench.ring.open(&token, end - Duration::from_nanos(1)).is_ok());
    assert_eq!(bench.ring.open(&token, end), Err(Refusal::Expired));
    assert_eq!(bench.ring.open(&token, at(NOW) - Duration::from_nanos(1)), Err(Refusal::NotYetValid));
    let lenient = bench.ring.clone().with_clock_skew(Duration::from_secs(60));
    assert!(lenient.open(&token, at(NOW - 5)).is_ok());
    assert_eq!(lenient.open(&token, at(NOW - 6)), Err(Refusal::NotYetValid), "5 s is the most");
    assert_eq!(lenient.open(&token, end), Err(Refusal::Expired), "no leeway after the end");
}

/// cases.md 16.
#[test]
fn eight_thousand_letters_are_the_most() {
    let bench = Bench::new();
    // Blanks inside JSON are free, so a token can be made exactly as long as one may be.
    let json = String::from_utf8(claims(PortScope::All).to_json()).unwrap();
    let frame = jwe::header(&bench.kid).len() + "..".len() + 16 + ".".len() + ".".len() + 22;
    let room = (MAX_TOKEN_CHARS - frame) * 3 / 4;
    let longest = bench.sealed(format!("{json}{}", " ".repeat(room - json.len())).as_bytes());
    assert_eq!(longest.len(), MAX_TOKEN_CHARS);
    assert!(bench.open(&longest).is_ok());
    let longer = bench.sealed(format!("{json}{}", " ".repeat(room + 1 - json.len())).as_bytes());
    assert_eq!(longer.len(), MAX_TOKEN_CHARS + 1);
    assert_eq!(bench.open(&longer), Err(Refusal::Unreadable));
    let widest = claims(scope(&[(65_534, 65_535); MAX_PORT_RANGES]));
    assert_eq!(bench.open(&bench.ring.mint(&widest)), Ok(widest));
}

/// cases.md 15.
#[test]
fn a_rotated_key_opens_for_an_hour_and_survives_a_restart() {
    let bench = Bench::new();
    let now = SystemTime::now();
    let claims = |now| Claims { issued_at: now, expires_at: now + Duration::from_secs(3_600), ..claims(PortScope::All) };
    let old = bench.ring.mint(&claims(now));
    let elsewhere = KeyRing::open_or_create(&bench.path()).unwrap();
    bench.ring.rotate_at(now).unwrap();
    let new = bench.ring.mint(&claims(now));
    assert_ne!(parts(&old)[0], parts(&new)[0]);
    assert_eq!(elsewhere.open(&new, now), Err(Refusal::UnknownKey), "not reloaded yet");
    elsewhere.reload().unwrap();
    let restarted = KeyRing::open_or_create(&bench.path()).unwrap();
    for ring in [&bench.ring, &bench.ring.clone(), &elsewhere, &restarted] {
        assert!(ring.open(&old, now).is_ok());
        assert!(ring.open(&old, now + Duration::from_secs(3_598)).is_ok());
        assert!(ring.open(&new, now).is_ok());
    }
    let later = now + Duration::from_secs(3_661);
    assert_eq!(restarted.open(&old, later), Err(Refusal::UnknownKey));
    // Rotated by the other process: both the first and the second key live on in the file until their hour is over.
    elsewhere.rotate_at(now + Duration::from_secs(1_800)).unwrap();
    bench.ring.reload().unwrap();
    assert!(bench.ring.open(&old, now + Duration::from_secs(1_800)).is_ok());
    assert!(bench.ring.open(&new, now + Duration::from_secs(3_000)).is_ok());
    bench.ring.rotate_at(now + Duration::from_secs(90_000)).unwrap();
    let saved: serde_json::Value = serde_json::from_slice(&fs::read(bench.path()).unwrap()).unwrap();
    assert_eq!(saved["keys"].as_array().unwrap().len(), 2, "dead keys are forgotten");
}

/// A node that reads the ring again within a minute of a rotation elsewhere has refused nobody, whatever it minted meanwhile.
#[test]
fn what_a_process_mints_before_it_has_seen_a_rotation_lives_its_whole_life() {
    let bench = Bench::new();
    let now = SystemTime::now();
    let elsewhere = KeyRing::open_existing(&bench.path()).unwrap();
    elsewhere.rotate_at(now).unwrap();
    let at = now + Duration::from_secs(50);
    let late = bench.ring.mint(&Claims { issued_at: at, expires_at: at + Duration::from_secs(3_600), ..claims(PortScope::All) });
    bench.ring.reload().unwrap();
    for ring in [&bench.ring, &elsewhere] {
        assert!(ring.open(&late, at + Duration::from_secs(3_598)).is_ok());
        assert_eq!(ring.open(&late, at + Duration::from_secs(3_600)), Err(Refusal::Expired));
    }
}

/// Puts a token into the cache that no key would open: who is let in with it was not asked for a tag.
fn planted(bench: &Bench, claims: &Claims) -> String {
    let genuine = bench.ring.mint(claims);
    let token = format!("{}{}", &genuine[..genuine.len() - 1], if genuine.ends_with('A') { 'Q' } else { 'A' });
    assert_eq!(bench.open(&token), Err(Refusal::NotAuthentic));
    bench.ring.plant(&token, claims);
    token
}

#[test]
fn a_token_that_was_opened_is_known_by_its_whole_text_until_it_dies() {
    let bench = Bench::new();
    let claims = claims(scope(&[(8080, 8080)]));
    let token = planted(&bench, &claims);
    assert_eq!(bench.open(&token), Ok(claims.clone()), "the cache is asked");
    // Its time is checked each time, on both sides.
    assert_eq!(bench.ring.open(&token, at(NOW + 900)), Err(Refusal::Expired));
    assert_eq!(bench.ring.open(&token, at(NOW - 1)), Err(Refusal::NotYetValid));
    assert!(bench.ring.open(&token, at(NOW + 899)).is_ok());
    // The same end picks the same place, and is not enough.
    for place in [0, 7, 15, 16, 300, token.len() / 2] {
        let mut other = token.clone().into_bytes();
        other[place] = if other[place] == b'A' { b'B' } else { b'A' };
        assert!(bench.open(std::str::from_utf8(&other).unwrap()).is_err(), "place {place}");
    }
    assert!(bench.open(&token[1..]).is_err());
    assert!(bench.open(&format!("A{token}")).is_err());
}

#[test]
fn no_rotation_and_no_reload_leaves_a_token_in_the_cache() {
    for renew in [KeyRing::rotate, KeyRing::reload] {
        let bench = Bench::new();
        let claims = claims(PortScope::All);
        let token = planted(&bench, &claims);
        assert!(bench.open(&token).is_ok());
        renew(&bench.ring).unwrap();
        assert_eq!(bench.open(&token), Err(Refusal::NotAuthentic));
    }
    // A key that has been taken out of the file opens nothing from the next reading on, whatever it has opened before.
    let bench = Bench::new();
    let token = bench.ring.mint(&claims(PortScope::All));
    assert!(bench.open(&token).is_ok() && bench.ring.n_opened() == 1);
    let elsewhere = Bench::new();
    fs::copy(elsewhere.path(), bench.path()).unwrap();
    bench.ring.reload().unwrap();
    assert_eq!((bench.open(&token), bench.ring.n_opened()), (Err(Refusal::UnknownKey), 0));
}

#[test]
fn a_key_that_opens_no_more_is_asked_for_also_when_the_token_is_known() {
    let bench = Bench::new();
    let now = SystemTime::now();
    // Longer than any honest token, so that only the key can end it.
    let claims = Claims { issued_at: now, expires_at: now + Duration::from_secs(90_000), ..claims(PortScope::All) };
    let token = bench.ring.mint(&claims);
    bench.ring.rotate_at(now).unwrap();
    bench.ring.plant(&token, &claims);
    assert!(bench.ring.open(&token, now + Duration::from_secs(3_650)).is_ok(), "the cache is asked");
    assert_eq!(bench.ring.open(&token, now + Duration::from_secs(3_661)), Err(Refusal::UnknownKey));
}

#[test]
fn the_cache_holds_what_was_authentic_and_in_time_and_has_a_bound() {
    let bench = Bench::new();
    let good = bench.ring.mint(&claims(PortScope::All));
    for token in [good[..good.len() - 4].to_owned(), format!("{good}."), bench.sealed(b"no claims")] {
        assert!(bench.open(&token).is_err());
    }
    assert_eq!(bench.ring.open(&good, at(NOW + 900)), Err(Refusal::Expired));
    assert_eq!(bench.ring.n_opened(), 0);
    let wide = bench.ring.mint(&claims(scope(&[(65_534, 65_535); MAX_PORT_RANGES])));
    assert!(bench.open(&wide).is_ok());
    assert_eq!(bench.ring.n_opened(), 0, "too long to be kept");
    for _ in 0..10_000 {
        assert!(bench.open(&bench.ring.mint(&claims(PortScope::All))).is_ok());
    }
    assert!((2_000..=4_096).contains(&bench.ring.n_opened()), "{}", bench.ring.n_opened());
}

#[test]
fn the_ring_file_is_private_and_nothing_else_is_left() {
    let bench = Bench::new();
    bench.ring.rotate().unwrap();
    let mut names: Vec<_> = fs::read_dir(bench.dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, [".keys.json.lock", "keys.json"]);
    assert_eq!(fs::metadata(bench.path()).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_ring_file_that_is_not_right_is_refused_with_the_reason_and_without_a_key() {
    let bench = Bench::new();
    let good = fs::read_to_string(bench.path()).unwrap();
    let secret = URL_SAFE_NO_PAD.encode(bench.secret);
    for (what, text, why) in [
        ("empty", String::new(), "JSON is damaged"),
        ("cut", good[..good.len() / 2].to_owned(), "JSON is damaged"),
        ("no keys", r#"{"version":1,"keys":[]}"#.to_owned(), "no key mints"),
        ("version", good.replace("\"version\": 1", "\"version\": 2"), "version 2"),
        ("short key", good.replace(&secret, &secret[..40]), "32 bytes"),
        ("odd letters", good.replace(&secret, &format!("!{}", &secret[1..])), "base64url"),
        ("kid", good.replace(&bench.kid.to_string(), "../x"), "JSON is damaged"),
        ("key in the wrong place", good.replace("\"version\": 1", &format!("\"version\": \"{secret}\"")), "JSON is damaged"),
        ("huge", format!("{good}{}", " ".repeat(300_000)), "too large"),
    ] {
        fs::write(bench.path(), &text).unwrap();
        let error = KeyRing::open_or_create(&bench.path()).map(|_| ()).unwrap_err();
        assert!(error.why.contains(why), "{what}: {error}");
        assert!(!error.to_string().contains(&secret[..8]), "{what}");
        assert!(bench.ring.reload().is_err(), "{what}");
        assert_eq!(fs::read_to_string(bench.path()).unwrap(), text, "a damaged ring is not replaced");
    }
    assert!(bench.open(&bench.ring.mint(&claims(PortScope::All))).is_ok(), "a failed reload changes nothing");
    fs::write(bench.path(), &good).unwrap();
    fs::set_permissions(bench.path(), fs::Permissions::from_mode(0o640)).unwrap();
    assert!(KeyRing::open_or_create(&bench.path()).map(|_| ()).unwrap_err().why.contains("chmod 600"));
    fs::remove_file(bench.path()).unwrap();
    assert!(bench.ring.rotate().unwrap_err().why.contains("disappeared"));
}

#[test]
fn debug_shows_no_key() {
    let bench = Bench::new();
    let shown = format!("{:?} {:#?}", bench.ring, bench.ring);
    assert!(shown.contains(&bench.kid.to_string()));
    assert!(!shown.contains(&URL_SAFE_NO_PAD.encode(bench.secret)) && !shown.contains(&format!("{:?}", bench.secret)));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in ".{0,300}") {
        let bench = Bench::new();
        prop_assert!(bench.open(&text).is_err());
    }

    #[test]
    fn no_parts_make_it_panic(parts in proptest::collection::vec("[A-Za-z0-9_-]{0,40}", 3)) {
        let bench = Bench::new();
        let token = format!("{}..{}.{}.{}", jwe::header(&bench.kid), parts[0], parts[1], parts[2]);
        prop_assert!(bench.open(&token).is_err());
    }

    #[test]
    fn no_plaintext_makes_it_panic(plaintext in ".{0,300}") {
        let bench = Bench::new();
        prop_assert!(bench.open(&bench.sealed(plaintext.as_bytes())).is_err());
    }

    #[test]
    fn every_scope_comes_back(ranges in proptest::collection::vec((1_u16.., 1_u16..), 0..50), shell: bool, minutes in 1_u64..=60) {
        let bench = Bench::new();
        let ranges: Vec<_> = ranges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).collect();
        let claims = Claims { shell, expires_at: at(NOW + minutes * 60), ..claims(scope(&ranges)) };
        prop_assert_eq!(bench.open(&bench.ring.mint(&claims)), Ok(claims));
    }
}
