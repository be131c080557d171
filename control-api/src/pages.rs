//! Lists in pages: opaque cursors over a stable order.
//!
//! A cursor names the operation, its filters and the sort key of the last item shown, so a page is right also when items
//! came or went meanwhile, and a cursor of another list is none. It is not secret and not signed: it only says where to
//! go on.

use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    reply::{Answer, ApiError, ErrorKind},
    routes::Operation,
};

/// Items on a page unless the caller wants another number (aws-behaviour §7.2).
const DEFAULT_PAGE: usize = 10;
/// A cursor of ours is never longer; AWS's are up to 800.
const MAX_CURSOR_CHARS: usize = 1_024;

/// What a caller asks of a list; both members were checked against the model.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PageRequest {
    max_results: Option<usize>,
    next_token: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Cursor {
    /// Of the operation and its filters.
    list: String,
    after: String,
}

/// One page of `items`, each with its sort key; keys are unique, their order is the order shown. `filters` are all that
/// decides what the list holds, in an order of the operation's own.
pub(crate) fn page(operation: Operation, filters: &[&str], mut items: Vec<(String, Value)>, request: &PageRequest) -> Result<Answer, ApiError> {
    let list = name_of(operation, filters);
    items.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(token) = request.next_token.as_deref().filter(|token| !token.is_empty()) {
        let after = read(&list, token).ok_or(ApiError::silent(ErrorKind::BadCursor))?;
        items.retain(|(key, _)| *key > after);
    }
    let size = request.max_results.unwrap_or(DEFAULT_PAGE);
    let more = items.len() > size;
    items.truncate(size);
    let next = match items.last() {
        Some((key, _)) if more => Value::String(write(&list, key)),
        _ => Value::Null,
    };
    let shown: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
    Ok(Answer::ok(json!({"items": shown, "nextToken": next})))
}

/// A name for the list that these filters make; short, whatever the filters are.
fn name_of(operation: Operation, filters: &[&str]) -> String {
    let mut hash = Sha256::new_with_prefix(operation.name());
    for filter in filters {
        // The length keeps two filters from being taken for two others with the same letters.
        hash.update(filter.len().to_be_bytes());
        hash.update(filter);
    }
    URL_SAFE.encode(&hash.finalize()[..12])
}

fn write(list: &str, after: &str) -> String {
    let cursor = Cursor { list: list.to_owned(), after: after.to_owned() };
    URL_SAFE.encode(serde_json::to_vec(&cursor).expect("a cursor is two texts"))
}

fn read(list: &str, token: &str) -> Option<String> {
    if token.len() > MAX_CURSOR_CHARS {
        return None;
    }
    let cursor: Cursor = serde_json::from_slice(&URL_SAFE.decode(token).ok()?).ok()?;
    (cursor.list == list).then_some(cursor.after)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(keys: &[&str]) -> Vec<(String, Value)> {
        keys.iter().map(|key| ((*key).to_owned(), json!(key))).collect()
    }

    fn ask(keys: &[&str], size: Option<usize>, token: Option<&str>) -> Result<(Vec<String>, Option<String>), ApiError> {
        let request = PageRequest { max_results: size, next_token: token.map(str::to_owned) };
        let body = page(Operation::ListMicrovms, &["of", "x"], items(keys), &request)?.body;
        let shown = serde_json::from_value(body["items"].clone()).unwrap();
        Ok((shown, body["nextToken"].as_str().map(str::to_owned)))
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repeat() {
        let keys = ["c", "a", "e", "b", "d"];
        let (first, next) = ask(&keys, Some(2), None).unwrap();
        assert_eq!(first, ["a", "b"]);
        // `b`, the item the cursor names, is gone, and `bb` came.
        let (second, next) = ask(&["c", "a", "e", "bb", "d"], Some(2), next.as_deref()).unwrap();
        assert_eq!(second, ["bb", "c"]);
        let (third, next) = ask(&keys, Some(2), next.as_deref()).unwrap();
        assert_eq!((third, next), (vec!["d".to_owned(), "e".to_owned()], None));
        let many: Vec<String> = (10..31).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let (shown, next) = ask(&many, None, None).unwrap();
        assert_eq!((shown.len(), next.is_some()), (10, true));
        assert_eq!(ask(&[], None, None).unwrap(), (vec![], None));
        assert_eq!(ask(&["a"], Some(1), Some("")).unwrap(), (vec!["a".to_owned()], None));
    }

    #[test]
    fn a_cursor_that_is_not_ours_is_refused_without_a_word() {
        let of = |operation, filters: &[&str]| write(&name_of(operation, filters), "a");
        assert!(ask(&["b"], None, Some(&of(Operation::ListMicrovms, &["of", "x"]))).is_ok());
        let elsewhere = of(Operation::ListMicrovmImages, &["of", "x"]);
        let others = [&["of", "y"][..], &["ofx", ""], &["o", "fx"], &["of"]].map(|filters| of(Operation::ListMicrovms, filters));
        let odd = ["x", "%%%", "e30=", "bnVsbA==", elsewhere.as_str(), "ä", &"A".repeat(2_000)];
        for token in odd.into_iter().chain(others.iter().map(String::as_str)) {
            assert_eq!(ask(&["a"], None, Some(token)), Err(ApiError::silent(ErrorKind::BadCursor)), "{token}");
        }
    }
}
