//! Other people's tokens: Wycheproof's, and those of RFC 7516 and RFC 7520 (`token/tests/vectors`, each with its licence).
//!
//! None of them is a token of ours, so all of them must be refused, also when they come under our header. Where the content is
//! A256GCM, the cipher behind our structural check must agree with the authors.

use std::{
    fs,
    panic::{self, AssertUnwindSafe},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use josekit::{
    jwe::{
        A256GCMKW, A256KW, Dir, ECDH_ES, ECDH_ES_A128KW, ECDH_ES_A256KW, JweContentEncryption as _, JweDecrypter, JweHeader, RSA_OAEP, RSA_OAEP_256,
        enc::A256GCM,
    },
    jwk::Jwk,
};
use model::PortScope;
use serde_json::Value;

use super::{Bench, claims, parts};
use crate::{Refusal, jwe};

fn read(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    serde_json::from_slice(&fs::read(&path).unwrap_or_else(|cause| panic!("{}: {cause}", path.display()))).unwrap()
}

fn text<'a>(value: &'a Value, member: &str) -> &'a str {
    value[member].as_str().unwrap_or_default()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A stranger's token as it stands, and what is left of it under a header of ours, with and without its key part.
fn is_refused(bench: &Bench, token: &str, what: &str) {
    use Refusal::{NotAuthentic, UnknownKey, Unreadable};
    assert!(matches!(bench.open(token), Err(Unreadable | UnknownKey)), "{what}: {token}");
    if let [_, key, iv, content, tag] = token.split('.').collect::<Vec<_>>()[..] {
        for header in jwe::headers(&bench.kid) {
            for key in [key, ""] {
                let disguised = format!("{header}.{key}.{iv}.{content}.{tag}");
                assert!(matches!(bench.open(&disguised), Err(Unreadable | NotAuthentic)), "{what}: {disguised}");
            }
        }
    }
}

/// The content key of a token, unwrapped by josekit.
fn content_key(token: &str, jwk: &Value) -> Option<[u8; 32]> {
    let [header, key, ..] = token.split('.').collect::<Vec<_>>()[..] else { return None };
    let header = JweHeader::from_bytes(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
    if header.content_encryption() != Some("A256GCM") {
        return None;
    }
    let jwk = Jwk::from_map(jwk.as_object()?.clone()).ok()?;
    let by: Box<dyn JweDecrypter> = match header.algorithm()? {
        "A256KW" => Box::new(A256KW.decrypter_from_jwk(&jwk).ok()?),
        "A256GCMKW" => Box::new(A256GCMKW.decrypter_from_jwk(&jwk).ok()?),
        "ECDH-ES" => Box::new(ECDH_ES.decrypter_from_jwk(&jwk).ok()?),
        "ECDH-ES+A128KW" => Box::new(ECDH_ES_A128KW.decrypter_from_jwk(&jwk).ok()?),
        "ECDH-ES+A256KW" => Box::new(ECDH_ES_A256KW.decrypter_from_jwk(&jwk).ok()?),
        "RSA-OAEP" => Box::new(RSA_OAEP.decrypter_from_jwk(&jwk).ok()?),
        "RSA-OAEP-256" => Box::new(RSA_OAEP_256.decrypter_from_jwk(&jwk).ok()?),
        _ => return None,
    };
    let key = URL_SAFE_NO_PAD.decode(key).ok()?;
    let key = by.decrypt((!key.is_empty()).then_some(&key), &A256GCM, &header).ok()?;
    key.as_ref().try_into().ok()
}

/// What our cipher says to the content of a stranger's token, once its key is known.
fn content(token: &str, key: &[u8; 32]) -> Result<Vec<u8>, Refusal> {
    let [header, _, iv, content, tag] = token.split('.').collect::<Vec<_>>()[..] else { return Err(Refusal::Unreadable) };
    jwe::decrypt(key, &jwe::split(&format!("{header}..{iv}.{content}.{tag}"))?)
}

#[test]
fn wycheproofs_tokens_are_refused_and_their_a256gcm_content_is_read() {
    let bench = Bench::new();
    let (mut n_tokens, mut n_read) = (0, 0);
    for group in list(&read("json_web_encryption_test.json")["testGroups"]) {
        for test in list(&group["tests"]) {
            let (token, what) = (text(test, "jwe"), format!("{} {}", test["tcId"], text(test, "comment")));
            n_tokens += 1;
            is_refused(&bench, token, &what);
            if text(test, "result") == "valid"
                && let Some(key) = content_key(token, &group["private"])
            {
                assert_eq!(content(token, &key), Ok(hex(text(test, "pt"))), "{what}");
                n_read += 1;
            }
        }
    }
    assert_eq!((n_tokens, n_read), (139, 10));
}

/// cases.md 14: AES-GCM's own vectors, as the content of a token. Only IVs of 12 bytes come to the cipher at all.
#[test]
fn wycheproofs_aes_gcm_vectors_hold_for_the_content_of_a_token() {
    let (mut n_valid, mut n_invalid, mut n_odd) = (0, 0, 0);
    for group in list(&read("aes_gcm_test.json")["testGroups"]).filter(|group| group["keySize"] == 256) {
        for test in list(&group["tests"]) {
            let [key, iv, aad, message, ciphertext, tag] = ["key", "iv", "aad", "msg", "ct", "tag"].map(|member| hex(text(test, member)));
            let key: [u8; 32] = key.try_into().unwrap();
            let valid = text(test, "result") == "valid";
            let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            let (iv_part, ciphertext_part, tag_part) = (encode(&iv), encode(&ciphertext), encode(&tag));
            let open = |header: &str| jwe::decrypt(&key, &jwe::parts(header, "", &iv_part, &ciphertext_part, &tag_part));
            let expected = if valid { Ok(message) } else { Err(Refusal::NotAuthentic) };
            if iv.len() != 12 || ciphertext.is_empty() {
                assert_eq!(open(""), Err(Refusal::NotAuthentic), "{}", test["tcId"]);
                n_odd += 1;
                continue;
            }
            match std::str::from_utf8(&aad) {
                Ok(header) => assert_eq!(open(header), expected, "{}", test["tcId"]),
                // No header of a token can be these bytes: the cipher alone.
                Err(_) => {
                    let opened = A256GCM.decrypt(&key, Some(&iv), &ciphertext, &aad, Some(&tag)).map_err(|_| Refusal::NotAuthentic);
                    assert_eq!(opened, expected, "{}", test["tcId"]);
                }
            }
            if valid { n_valid += 1 } else { n_invalid += 1 }
        }
    }
    assert_eq!((n_valid, n_invalid, n_odd), (37, 27, 41));
}

/// RFC 7520 §5: RSA, ECDH, PBES2, key wrapping, direct encryption with a shorter key, compression, JSON of every kind.
#[test]
fn the_examples_of_rfc_7520_are_refused() {
    let bench = Bench::new();
    let (mut n_compact, mut n_json, mut n_read) = (0, 0, 0);
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/rfc7520")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !name.ends_with(".json") {
            continue;
        }
        let example = read(&format!("rfc7520/{name}"));
        for (form, token) in example["output"].as_object().unwrap() {
            match token {
                Value::String(token) => {
                    is_refused(&bench, token, &name);
                    n_compact += 1;
                    if text(&example["input"], "enc") == "A256GCM" {
                        let key = URL_SAFE_NO_PAD.decode(text(&example["generated"], "cek")).unwrap().try_into().unwrap();
                        assert_eq!(content(token, &key), Ok(text(&example["input"], "plaintext").as_bytes().to_vec()), "{name}");
                        n_read += 1;
                    }
                }
                json => {
                    assert_eq!(bench.open(&json.to_string()), Err(Refusal::Unreadable), "{name} {form}");
                    n_json += 1;
                }
            }
        }
    }
    assert_eq!((n_compact, n_json, n_read), (9, 25, 1));
}

/// RFC 7516 appendix A.1–A.3. The content of A.1 is A256GCM under this key.
#[test]
fn the_examples_of_rfc_7516_are_refused_and_the_first_ones_content_is_read() {
    let bench = Bench::new();
    let a1 = concat!(
        "eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.",
        "OKOawDo13gRp2ojaHV7LFpZcgV7T6DVZKTyKOMTYUmKoTCVJRgckCL9kiMT03JGeipsEdY3mx_etLbbWSrFr05kLzcSr4qKAq7YN7e9jwQRb23nfa6c9d-",
        "StnImGyFDbSv04uVuxIp5Zms1gNxKKK2Da14B8S4rzVRltdYwam_lDp5XnZAYpQdb76FdIKLaVmqgfwX7XWRxv2322i-vDxRfqNzo_tETKzpVLzfiwQyey",
        "PGLBIO56YJ7eObdv0je81860ppamavo35UgoRdbYaBcoh9QcfylQr66oc6vFWXRcZ_ZT2LawVCWTIy3brGPi6UklfCpIMfIjf7iGdXKHzg.",
        "48V1_ALb6US04U3b.",
        "5eym8TW_c8SuK0ltJ3rpYIzOeDQz7TALvtu6UG9oMo4vpzs9tX_EFShS8iB7j6jiSdiwkIr3ajwQzaBtQD_A.",
        "XFBoMYUZodetZdvTiFvSkQ"
    );
    let a2 = concat!(
        "eyJhbGciOiJSU0ExXzUiLCJlbmMiOiJBMTI4Q0JDLUhTMjU2In0.",
        "UGhIOguC7IuEvf_NPVaXsGMoLOmwvc1GyqlIKOK1nN94nHPoltGRhWhw7Zx0-kFm1NJn8LE9XShH59_i8J0PH5ZZyNfGy2xGdULU7sHNF6Gp2vPLgNZ__d",
        "eLKxGHZ7PcHALUzoOegEI-8E66jX2E4zyJKx-YxzZIItRzC5hlRirb6Y5Cl_p-ko3YvkkysZIFNPccxRU7qve1WYPxqbb2Yw8kZqa2rMWI5ng8OtvzlV7el",
        "prCbuPhcCdZ6XDP0_F8rkXds2vE4X-ncOIM8hAYHHi29NX0mcKiRaD0-D-ljQTP-cFPgwCp6X-nZZd9OHBv-B3oWh2TbqmScqXMR4gp_A.",
        "AxY8DCtDaGlsbGljb3RoZQ.",
        "KDlTtXchhZTGufMYmOYGS4HffxPSUrfmqCHXaI9wOGY.",
        "9hH0vgRfYgPnAHOd8stkvw"
    );
    let a3 = concat!(
        "eyJhbGciOiJBMTI4S1ciLCJlbmMiOiJBMTI4Q0JDLUhTMjU2In0.",
        "6KB707dM9YTIgHtLvtgWQ8mKwboJW3of9locizkDTHzBC2IlrT1oOQ.",
        "AxY8DCtDaGlsbGljb3RoZQ.",
        "KDlTtXchhZTGufMYmOYGS4HffxPSUrfmqCHXaI9wOGY.",
        "U0m_YmjN04DJvceFICbCVQ"
    );
    for (what, token) in [("A.1", a1), ("A.2", a2), ("A.3", a3)] {
        assert_eq!(bench.open(token), Err(Refusal::UnknownKey), "{what}");
        is_refused(&bench, token, what);
    }
    let key = [
        177, 161, 244, 128, 84, 143, 225, 115, 63, 180, 3, 255, 107, 154, 212, 246, 138, 7, 110, 91, 112, 46, 34, 105, 47, 130, 203, 46, 122,
        234, 64, 252,
    ];
    assert_eq!(content(a1, &key), Ok(b"The true sign of intelligence is not knowledge but imagination.".to_vec()));
}

/// What josekit 0.10 does with tokens that this crate must never hand to it (pingora.md §6). When one of these fails, josekit
/// has been mended; the checks stay all the same.
#[test]
fn the_defects_of_josekit_are_there_and_are_not_reached() {
    let bench = Bench::new();
    let [header, _, iv, text, tag] = parts(&bench.ring.mint(&claims(PortScope::All)));
    let by_josekit = |token: &str| josekit::jwe::deserialize_compact(token, &Dir.decrypter_from_bytes(bench.secret).unwrap()).map(|_| ());
    let tag_bytes = URL_SAFE_NO_PAD.decode(&tag).unwrap();
    for length in [1, 4, 8, 12, 15] {
        let cut = format!("{header}..{iv}.{text}.{}", URL_SAFE_NO_PAD.encode(&tag_bytes[..length]));
        assert!(by_josekit(&cut).is_ok(), "josekit takes a tag of {length} bytes");
        assert_eq!(bench.open(&cut), Err(Refusal::NotAuthentic));
    }
    // The forgery that follows from it: one byte of tag is guessed in 256 tries, and the claims are the forger's.
    let mut changed = URL_SAFE_NO_PAD.decode(&text).unwrap();
    changed[20] ^= 1;
    let changed = URL_SAFE_NO_PAD.encode(changed);
    let guesses = || (0..=u8::MAX).map(|guess| format!("{header}..{iv}.{changed}.{}", URL_SAFE_NO_PAD.encode([guess])));
    assert!(guesses().any(|guess| by_josekit(&guess).is_ok()));
    assert!(guesses().all(|guess| bench.open(&guess) == Err(Refusal::NotAuthentic)));
    // An empty IV makes it panic, whoever sends it.
    let no_iv = format!("{header}...{text}.{tag}");
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| by_josekit(&no_iv)));
    panic::set_hook(hook);
    assert!(outcome.is_err(), "josekit panics at an empty IV");
    assert_eq!(bench.open(&no_iv), Err(Refusal::NotAuthentic));
    // It inflates what it opens: 6 kB to 4 MB here.
    let mut zip = JweHeader::new();
    zip.set_key_id(bench.kid.to_string());
    zip.set_algorithm("dir");
    zip.set_content_encryption("A256GCM");
    zip.set_compression("DEF");
    let bomb = josekit::jwe::serialize_compact(&vec![b' '; 4 << 20], &zip, &Dir.encrypter_from_bytes(bench.secret).unwrap()).unwrap();
    assert!(bomb.len() < crate::MAX_TOKEN_CHARS, "{} characters", bomb.len());
    assert!(by_josekit(&bomb).is_ok());
    assert_eq!(bench.open(&bomb), Err(Refusal::UnknownKey));
    // And its content under our own header is no claims: it is never inflated.
    let [_, _, iv, _, _] = parts(&bomb);
    let deflated = format!("{header}..{iv}.{}", bomb.splitn(4, '.').nth(3).unwrap());
    assert_eq!(bench.open(&deflated), Err(Refusal::NotAuthentic));
}
