//! Idempotency: a call that is repeated with its client token does nothing again and answers what it answered.
//!
//! Owns: `client-tokens.redb`. Order of things for a token: its entry is written *before* the call acts, with a
//! fingerprint of the parameters; the answer is added after. An entry without an answer means that the process ended in
//! between: then the one who acted is asked whether it happened, and only if not the call acts again. So no crash makes
//! two microVMs of one call. Calls of one token wait for each other.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redb::{Database, ReadableDatabase as _, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::Mutex;

use crate::{
    OpenError,
    caller::Caller,
    reply::{Answer, ApiError, ErrorKind},
};

/// `<access key id>/<operation>/<token>` → [`Entry`] as JSON.
const ENTRIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("client_tokens");
/// Longer than any microVM lives; AWS's own retention is not known (aws-behaviour §3.4).
const KEPT: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Old entries are looked for once in so many writes.
const WRITES_PER_CLEANING: u32 = 4_096;
/// Different tokens share a lock now and then; acting takes milliseconds.
const LOCKS: usize = 64;

/// The record of client tokens. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ClientTokens {
    database: Arc<Database>,
    /// Taken for the whole of a call, by the hash of its key.
    locks: Arc<Vec<Mutex<()>>>,
    writes: Arc<AtomicU32>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    fingerprint: String,
    /// Seconds since 1970.
    at: u64,
    /// Status and body; `None` while the call acts.
    answer: Option<(u16, Value)>,
}

/// Which call it is.
pub(crate) struct Call {
    key: String,
    fingerprint: String,
    at: SystemTime,
}

impl Call {
    /// The token is the caller's own: another key may use the same one. The fingerprint is of the whole input: members in
    /// order, the token itself included.
    pub(crate) fn new(operation: &str, caller: &Caller, token: &str, input: &Value, at: SystemTime) -> Self {
        Self { key: format!("{}/{operation}/{token}", caller.key), fingerprint: hex::encode(Sha256::digest(sorted(input).to_string())), at }
    }
}

/// The same JSON with the members of every object in order, so that equal inputs have equal texts.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().filter(|(_, value)| !value.is_null()).collect();
            members.sort_by_key(|(name, _)| *name);
            Value::Object(members.into_iter().map(|(name, value)| (name.clone(), sorted(value))).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

impl ClientTokens {
    /// Opens the record and forgets what is older than a week.
    pub(crate) fn open(path: &Path, now: SystemTime) -> Result<Self, OpenError> {
        let opened = || -> Result<Database, redb::Error> {
            let database = idle_controller::database::open(path)?;
            let write = database.begin_write()?;
            clean(&mut write.open_table(ENTRIES)?, seconds(now))?;
            write.commit()?;
            Ok(database)
        };
        let database = opened().map_err(|cause| OpenError { doing: format!("opening the record of client tokens {}", path.display()), source: Box::new(cause) })?;
        Ok(Self { database: Arc::new(database), locks: Arc::new((0..LOCKS).map(|_| Mutex::new(())).collect()), writes: Arc::default() })
    }

    /// Acts once for all calls of one token. `found` looks for what an interrupted earlier call has already done.
    pub(crate) async fn once<Act>(&self, call: Call, found: impl FnOnce() -> Option<Answer>, act: Act) -> Result<Answer, ApiError>
    where
        Act: Future<Output = Result<Answer, ApiError>>,
    {
        let lock = usize::from(Sha256::digest(&call.key)[0]) % LOCKS;
        let _turn = self.locks[lock].lock().await;
        let earlier = match self.read(&call.key)? {
            Some(entry) if entry.fingerprint != call.fingerprint => {
                return Err(ApiError::new(
                    ErrorKind::Conflict,
                    "The clientToken was used before for a request with other parameters. Use a new clientToken for a new request.",
                ));
            }
            Some(Entry { answer: Some((status, body)), .. }) => {
                let status = http::StatusCode::from_u16(status).map_err(|cause| ApiError::internal("reading the record of client tokens", &cause))?;
                return Ok(Answer { status, body });
            }
            Some(Entry { answer: None, .. }) => found(),
            None => {
                self.write(&call, None).await?;
                None
            }
        };
        let answer = match earlier {
            Some(answer) => answer,
            None => match act.await {
                Ok(answer) => answer,
                Err(refused) => {
                    self.forget(&call).await;
                    return Err(refused);
                }
            },
        };
        if let Err(error) = self.write(&call, Some(&answer)).await {
            // It was done and stays done; a repeat finds it by asking the one who did it.
            tracing::warn!(?error, "the answer to a call with a client token could not be kept");
        }
        Ok(answer)
    }

    fn read(&self, key: &str) -> Result<Option<Entry>, ApiError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let entries = self.database.begin_read()?.open_table(ENTRIES)?;
            Ok(entries.get(key)?.map(|entry| entry.value().to_vec()))
        };
        let bytes = read().map_err(|cause| ApiError::internal("reading the record of client tokens", &cause))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    async fn write(&self, call: &Call, answer: Option<&Answer>) -> Result<(), ApiError> {
        let entry = Entry {
            fingerprint: call.fingerprint.clone(),
            at: seconds(call.at),
            answer: answer.map(|answer| (answer.status.as_u16(), answer.body.clone())),
        };
        let bytes = serde_json::to_vec(&entry).map_err(|cause| ApiError::internal("writing the record of client tokens", &cause))?;
        self.change(call, Some(bytes)).await.map_err(|cause| ApiError::internal("writing the record of client tokens", &*cause))
    }

    async fn forget(&self, call: &Call) {
        if let Err(error) = self.change(call, None).await {
            // Left as it is, a repeat asks whether it was done, finds nothing and acts.
            tracing::warn!(%error, "the entry of a refused call could not be taken back");
        }
    }

    async fn change(&self, call: &Call, entry: Option<Vec<u8>>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let (database, key, now) = (Arc::clone(&self.database), call.key.clone(), seconds(call.at));
        let cleans = self.writes.fetch_add(1, Ordering::Relaxed) % WRITES_PER_CLEANING == WRITES_PER_CLEANING - 1;
        let write = move || -> Result<(), redb::Error> {
            let write = database.begin_write()?;
            {
                let mut entries = write.open_table(ENTRIES)?;
                match entry {
                    Some(entry) => drop(entries.insert(key.as_str(), entry.as_slice())?),
                    None => drop(entries.remove(key.as_str())?),
                }
                if cleans {
                    clean(&mut entries, now)?;
                }
            }
            write.commit()?;
            Ok(())
        };
        // A commit waits for the disk.
        tokio::task::spawn_blocking(write).await??;
        Ok(())
    }
}

/// Forgets what is older than a week, and what cannot be read and so answers no call.
fn clean(entries: &mut redb::Table<'_, &'static str, &'static [u8]>, now: u64) -> Result<(), redb::StorageError> {
    let oldest = now.saturating_sub(KEPT.as_secs());
    entries.retain(|_, entry| serde_json::from_slice::<Entry>(entry).is_ok_and(|entry| entry.at >= oldest))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::json;

    use super::*;

    struct Bench {
        dir: tempfile::TempDir,
        acted: AtomicU32,
    }

    impl Bench {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), acted: AtomicU32::new(0) }
        }

        fn open(&self, now: SystemTime) -> ClientTokens {
            ClientTokens::open(&self.dir.path().join("t.redb"), now).unwrap()
        }

        async fn call(&self, tokens: &ClientTokens, token: &str, input: Value) -> Result<Value, ErrorKind> {
            self.call_by("AKIA1", tokens, token, input).await
        }

        async fn call_by(&self, key: &str, tokens: &ClientTokens, token: &str, input: Value) -> Result<Value, ErrorKind> {
            let act = async { Ok(Answer::ok(json!(self.acted.fetch_add(1, Ordering::SeqCst)))) };
            let call = Call::new("Run", &caller(key), token, &input, now());
            tokens.once(call, || None, act).await.map(|answer| answer.body).map_err(|error| error.kind)
        }
    }

    fn caller(key: &str) -> Caller {
        Caller { key: key.to_owned(), name: "default".to_owned(), role: None }
    }

    #[tokio::test]
    async fn the_token_of_one_key_is_not_that_of_another() {
        let bench = Bench::new();
        let tokens = bench.open(now());
        assert_eq!(bench.call_by("AKIA1", &tokens, "t", json!({"a": 1})).await, Ok(json!(0)));
        assert_eq!(bench.call_by("AKIA2", &tokens, "t", json!({"a": 2})).await, Ok(json!(1)));
        assert_eq!(bench.call_by("AKIA1", &tokens, "t", json!({"a": 1})).await, Ok(json!(0)));
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_790_000_000)
    }

    #[tokio::test]
    async fn a_repeat_answers_the_same_and_other_parameters_conflict() {
        let bench = Bench::new();
        let tokens = bench.open(now());
        assert_eq!(bench.call(&tokens, "t", json!({"a": 1, "b": [1]})).await, Ok(json!(0)));
        assert_eq!(bench.call(&tokens, "t", json!({"b": [1], "a": 1, "c": null})).await, Ok(json!(0)));
        assert_eq!(bench.call(&tokens, "t", json!({"a": 1, "b": [2]})).await, Err(ErrorKind::Conflict));
        assert_eq!(bench.call(&tokens, "u", json!({"a": 1, "b": [1]})).await, Ok(json!(1)));
        drop(tokens);
        let tokens = bench.open(now() + KEPT);
        assert_eq!(bench.call(&tokens, "t", json!({"a": 1, "b": [1]})).await, Ok(json!(0)), "after a restart");
        drop(tokens);
        let tokens = bench.open(now() + KEPT + Duration::from_secs(1));
        assert_eq!(bench.call(&tokens, "t", json!({"a": 1, "b": [1]})).await, Ok(json!(2)), "after a week");
    }

    #[tokio::test]
    async fn calls_at_the_same_time_act_once() {
        let bench = Bench::new();
        let tokens = bench.open(now());
        let calls = (0..20).map(|_| bench.call(&tokens, "t", json!({})));
        let answers = futures::future::join_all(calls).await;
        assert_eq!(answers, vec![Ok(json!(0)); 20]);
    }

    #[tokio::test]
    async fn a_refused_call_may_be_tried_again() {
        let bench = Bench::new();
        let tokens = bench.open(now());
        let call = || Call::new("Run", &caller("AKIA1"), "t", &json!({}), now());
        let refused = tokens.once(call(), || None, async { Err(ApiError::validation("no")) }).await;
        assert!(refused.is_err());
        assert_eq!(bench.call(&tokens, "t", json!({"other": 1})).await, Ok(json!(0)));
    }

    #[tokio::test]
    async fn an_interrupted_call_is_looked_for_before_it_acts_again() {
        let bench = Bench::new();
        let tokens = bench.open(now());
        let call = || Call::new("Run", &caller("AKIA1"), "t", &json!({}), now());
        for (found, expected) in [(Some(Answer::ok(json!("found"))), json!("found")), (None, json!(0))] {
            // As if the process had ended between the first write and the answer.
            tokens.write(&call(), None).await.unwrap();
            let act = async { Ok(Answer::ok(json!(bench.acted.fetch_add(1, Ordering::SeqCst)))) };
            assert_eq!(tokens.once(call(), || found, act).await.unwrap().body, expected);
            assert_eq!(bench.call(&tokens, "t", json!({})).await, Ok(expected), "and is remembered");
        }
    }
}
