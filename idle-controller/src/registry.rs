//! What survives this process: one record per microVM, on stable storage before anybody is told.
//!
//! Owns: `registry.redb`, its schema and its one writer. Never decides anything: it keeps what it is given. Writes that
//! arrive while another is being synced go into the next transaction together, so that fifty wakes at once cost a few
//! syncs and not fifty.
//!
//! Not every phase is a state here, because what matters is what a crash at that instant would leave behind. A wake is
//! recorded as SUSPENDED until the microVM runs: nobody has reached it before that, and its snapshot is untouched. A
//! suspend is recorded as RUNNING until its snapshot is committed; after a crash in between, the snapshot and the process
//! themselves say which of the two it was (see `reconcile.rs`).

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use model::{Egress, EndpointId, Generation, Hooks, IdlePolicy, ImageName, ImageVersion, MemorySize, MicrovmId, RunPayload, Usage};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::{mpsc, oneshot};

use crate::{ControllerError, database, machine::EndReason, metering::SavedUsage};

/// Key: the microVM's id. Value: [`Record`] as JSON.
const MICROVMS: TableDefinition<&str, &[u8]> = TableDefinition::new("microvms");
/// Key: the microVM's id. Value: [`SavedUsage`] as JSON. Absent: it has used nothing yet.
const USAGE: TableDefinition<&str, &[u8]> = TableDefinition::new("usage");
/// Key: an image's name. Value: the [`Usage`] of all its microVMs that are forgotten, as JSON.
const IMAGE_USAGE: TableDefinition<&str, &[u8]> = TableDefinition::new("image-usage");
/// Facts about the file itself.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// The version of everything in the file; grows when a record of today could not be read as one of yesterday.
const SCHEMA: u64 = 1;

/// Writes in line before callers have to wait to get in line: several times the drivers that can be in a transition at
/// once, at some hundred bytes each.
const QUEUE: usize = 1024;

/// How long another process that is just ending may keep the file locked.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(50);

/// All that must be known of a microVM after a restart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: MicrovmId,
    pub(crate) endpoint: EndpointId,
    pub(crate) image: ImageName,
    pub(crate) version: ImageVersion,
    pub(crate) image_dir: PathBuf,
    pub(crate) idle: Option<IdlePolicy>,
    pub(crate) max_duration: Duration,
    pub(crate) identity: BTreeMap<String, String>,
    /// Records of older programs lack it; their guests had no network.
    #[serde(default)]
    pub(crate) egress: Egress,
    /// Which hooks its app wants called.
    #[serde(default)]
    pub(crate) hooks: Option<Hooks>,
    /// What `/run` is to be sent; `None` once it has answered, or if nobody asked for the call.
    #[serde(default)]
    pub(crate) run_due: Option<RunDue>,
    /// Its app may have heard `/suspend` and not `/resume` since: written before the one is called and after the other.
    #[serde(default)]
    pub(crate) resume_due: bool,
    pub(crate) request: serde_json::Value,
    /// Records of older programs lack it; they kept all output.
    #[serde(default = "yes")]
    pub(crate) keep_output: bool,
    /// Its size. Records of older programs lack it.
    #[serde(default)]
    pub(crate) size: MemorySize,
    pub(crate) started_at: SystemTime,
    pub(crate) generation: Generation,
    pub(crate) state: SavedState,
    /// Wall time of this writing. Time that passes while no process of ours runs is counted from here, so that a clock
    /// that was put right during an earlier run does no harm.
    pub(crate) saved_at: SystemTime,
    /// Of `max_duration`, used up at `saved_at` (measured by the monotonic clock).
    pub(crate) lived: Duration,
    /// Of the suspended duration, used up at `saved_at`; zero unless it is suspended.
    pub(crate) asleep: Duration,
}

fn yes() -> bool {
    true
}

/// A `/run` call that is not answered. While there is one, nothing has reached the microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunDue {
    pub(crate) payload: Option<RunPayload>,
}

/// What a record says of the life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SavedState {
    /// Taken, not launched yet.
    Pending,
    /// Awake, or on its way to sleep.
    Running,
    /// Asleep, or on its way to wake.
    Suspended {
        /// If it did not just go to sleep.
        reason: Option<String>,
    },
    /// To be removed.
    Terminating {
        /// Why.
        reason: EndReason,
    },
    /// Removed.
    Terminated {
        /// Why.
        reason: EndReason,
        /// When.
        at: SystemTime,
    },
}

/// A failed write: shared by all who were in the transaction.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the write to the registry failed")]
pub(crate) struct WriteError(#[source] Arc<dyn std::error::Error + Send + Sync>);

/// The file. Cheap to clone; the file is closed when the last clone is gone.
#[derive(Clone)]
pub(crate) struct Store {
    queue: mpsc::Sender<Write>,
}

struct Write {
    change: Change,
    done: oneshot::Sender<Result<(), WriteError>>,
}

enum Change {
    Put { key: String, json: Vec<u8>, usage: Vec<u8> },
    /// Of microVMs that are recorded.
    PutUsage { rows: Vec<(String, Vec<u8>)> },
    /// Its use goes to its image.
    Delete { key: String, image: String },
    /// The last one: the file is closed before it is answered.
    Close,
}

/// What was found at start.
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) records: Vec<Record>,
    pub(crate) usage: HashMap<MicrovmId, SavedUsage>,
    /// Of microVMs that are forgotten.
    pub(crate) by_image: BTreeMap<ImageName, Usage>,
    /// The file was made just now.
    pub(crate) fresh: bool,
}

impl Store {
    /// Opens or makes the file and reads all of it.
    pub(crate) async fn open(path: PathBuf) -> Result<Opened, ControllerError> {
        let doing = format!("opening the registry {}", path.display());
        let deadline = tokio::time::Instant::now() + LOCK_PATIENCE;
        loop {
            let at = path.clone();
            match blocking(&doing, move || open_file(&at)).await? {
                Ok(Contents { database, records, usage, by_image, fresh }) => {
                    let (queue, writes) = mpsc::channel(QUEUE);
                    // Ends by itself when the last clone of the sender is gone and everything sent is written.
                    tokio::spawn(write_all(Arc::new(database), writes));
                    return Ok(Opened { store: Store { queue }, records, usage, by_image, fresh });
                }
                Err(OpenError::Locked) if tokio::time::Instant::now() < deadline => tokio::time::sleep(LOCK_POLL).await,
                Err(error) => return Err(ControllerError::Registry { doing, source: Box::new(error) }),
            }
        }
    }

    /// A record with what its microVM has used until now. Durable on `Ok`.
    pub(crate) async fn put(&self, record: &Record, usage: &SavedUsage) -> Result<(), WriteError> {
        self.write(Change::Put { key: record.id.to_string(), json: json(record)?, usage: json(usage)? }).await
    }

    /// What some have used until now. Durable on `Ok`.
    pub(crate) async fn put_usage(&self, usage: Vec<(MicrovmId, SavedUsage)>) -> Result<(), WriteError> {
        if usage.is_empty() {
            return Ok(());
        }
        let rows = usage.iter().map(|(id, usage)| Ok((id.to_string(), json(usage)?))).collect::<Result<_, WriteError>>()?;
        self.write(Change::PutUsage { rows }).await
    }

    /// Forgets a microVM; what it used is added to its image's. Durable on `Ok`.
    pub(crate) async fn delete(&self, id: MicrovmId, image: &ImageName) -> Result<(), WriteError> {
        self.write(Change::Delete { key: id.to_string(), image: image.to_string() }).await
    }

    /// Closes the file once everything that was sent is written. Later writes fail.
    pub(crate) async fn close(&self) {
        // It can only fail because the writer has ended already.
        let _ = self.write(Change::Close).await;
    }

    async fn write(&self, change: Change) -> Result<(), WriteError> {
        let (done, outcome) = oneshot::channel();
        let closed = || WriteError(Arc::from(Box::from("the registry's writer has ended")));
        self.queue.send(Write { change, done }).await.map_err(|_| closed())?;
        outcome.await.map_err(|_| closed())?
    }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, WriteError> {
    serde_json::to_vec(value).map_err(|error| WriteError(Arc::new(error)))
}

/// A file, open, with all that is in it.
struct Contents {
    database: Database,
    records: Vec<Record>,
    usage: HashMap<MicrovmId, SavedUsage>,
    by_image: BTreeMap<ImageName, Usage>,
    fresh: bool,
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("another process has it open")]
    Locked,
    #[error("it has schema {found}, this program knows schemas up to {SCHEMA}; use the program that wrote it, or a newer one")]
    Newer { found: u64 },
    #[error("the record of {key} cannot be read")]
    Record {
        key: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("the file cannot be read or written")]
    File(#[source] redb::Error),
}

fn file(error: impl Into<redb::Error>) -> OpenError {
    OpenError::File(error.into())
}

fn open_file(path: &Path) -> Result<Contents, OpenError> {
    let fresh = !path.try_exists().map_err(|error| file(redb::Error::Io(error)))?;
    let database = match database::open(path) {
        Err(DatabaseError::DatabaseAlreadyOpen) => return Err(OpenError::Locked),
        other => other.map_err(file)?,
    };
    let transaction = database.begin_write().map_err(file)?;
    {
        let mut meta = transaction.open_table(META).map_err(file)?;
        let found = meta.get("schema").map_err(file)?.map(|value| value.value());
        match found {
            Some(found) if found > SCHEMA => return Err(OpenError::Newer { found }),
            Some(_) => {}
            None => {
                meta.insert("schema", SCHEMA).map_err(file)?;
            }
        }
        for table in [MICROVMS, USAGE, IMAGE_USAGE] {
            transaction.open_table(table).map_err(file)?;
        }
    }
    transaction.commit().map_err(file)?;

    let records: Vec<Record> = rows(&database, MICROVMS)?.into_iter().map(|(_, record)| record).collect();
    let usage = rows(&database, USAGE)?.into_iter().filter_map(|(id, usage)| Some((id.parse().ok()?, usage))).collect();
    let by_image = rows(&database, IMAGE_USAGE)?.into_iter().filter_map(|(name, usage)| Some((name.parse().ok()?, usage))).collect();
    Ok(Contents { database, records, usage, by_image, fresh })
}

/// All of a table.
fn rows<T: DeserializeOwned>(database: &Database, table: TableDefinition<&str, &[u8]>) -> Result<Vec<(String, T)>, OpenError> {
    let mut found = Vec::new();
    let table = database.begin_read().map_err(file)?.open_table(table).map_err(file)?;
    for row in table.iter().map_err(file)? {
        let (key, value) = row.map_err(file)?;
        let value = serde_json::from_slice(value.value()).map_err(|source| OpenError::Record { key: key.value().to_owned(), source })?;
        found.push((key.value().to_owned(), value));
    }
    Ok(found)
}

async fn write_all(database: Arc<Database>, mut writes: mpsc::Receiver<Write>) {
    let mut batch = Vec::new();
    let mut closing = false;
    while writes.recv_many(&mut batch, QUEUE).await > 0 {
        if batch.iter().any(|write| matches!(write.change, Change::Close)) {
            closing = true;
            writes.close();
        }
        let for_commit = Arc::clone(&database);
        let (changes, waiting): (Vec<_>, Vec<_>) = batch.drain(..).map(|write| (write.change, write.done)).unzip();
        let outcome = match tokio::task::spawn_blocking(move || commit(&for_commit, changes)).await {
            Ok(outcome) => outcome.map_err(|error| WriteError(Arc::new(error))),
            Err(panicked) => Err(WriteError(Arc::new(panicked))),
        };
        if closing && writes.is_empty() {
            // Nothing can come any more. Whoever waits for the close may open the file at once.
            drop(database);
            answer(waiting, &outcome);
            return;
        }
        answer(waiting, &outcome);
    }
}

fn answer(waiting: Vec<oneshot::Sender<Result<(), WriteError>>>, outcome: &Result<(), WriteError>) {
    for done in waiting {
        // Who no longer waits does not need to know.
        let _ = done.send(outcome.clone());
    }
}

fn commit(database: &Database, changes: Vec<Change>) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut microvms = transaction.open_table(MICROVMS)?;
        let mut used = transaction.open_table(USAGE)?;
        let mut by_image = transaction.open_table(IMAGE_USAGE)?;
        for change in changes {
            match change {
                Change::Put { key, json, usage } => {
                    microvms.insert(key.as_str(), json.as_slice())?;
                    used.insert(key.as_str(), usage.as_slice())?;
                }
                Change::PutUsage { rows } => {
                    for (key, usage) in rows {
                        // One that was forgotten meanwhile stays forgotten.
                        if microvms.get(key.as_str())?.is_some() {
                            used.insert(key.as_str(), usage.as_slice())?;
                        }
                    }
                }
                Change::Delete { key, image } => {
                    microvms.remove(key.as_str())?;
                    // In the same transaction: a second try finds nothing to add.
                    let last = used.remove(key.as_str())?.and_then(|usage| serde_json::from_slice::<SavedUsage>(usage.value()).ok());
                    if let Some(last) = last {
                        let mut sum = by_image.get(image.as_str())?.and_then(|sum| serde_json::from_slice::<Usage>(sum.value()).ok()).unwrap_or_default();
                        sum += last.usage;
                        let sum = serde_json::to_vec(&sum).expect("numbers are JSON");
                        by_image.insert(image.as_str(), sum.as_slice())?;
                    }
                }
                Change::Close => {}
            }
        }
    }
    // Syncs before it returns: redb's default durability.
    transaction.commit()?;
    Ok(())
}

async fn blocking<T: Send + 'static>(doing: &str, work: impl FnOnce() -> T + Send + 'static) -> Result<T, ControllerError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|source| ControllerError::Registry { doing: doing.to_owned(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            id: MicrovmId::random(),
            endpoint: EndpointId::random(),
            image: "hello".parse().unwrap(),
            version: ImageVersion::FIRST,
            image_dir: "/images/hello".into(),
            idle: Some(IdlePolicy { max_idle: Duration::from_secs(60), suspended: Duration::from_millis(1500), auto_resume: true }),
            max_duration: Duration::from_secs(28_800),
            identity: BTreeMap::from([("AWS_REGION".to_owned(), "eu-north-1".to_owned())]),
            egress: Egress::Internet,
            hooks: Some(Hooks { run: Some(Duration::from_secs(1)), ..Hooks::none(model::Port::DEFAULT) }),
            run_due: Some(RunDue { payload: Some(RunPayload("for /run".to_owned())) }),
            resume_due: false,
            request: serde_json::json!({"clientToken": "t", "tags": [1, null]}),
            keep_output: false,
            size: MemorySize::DEFAULT,
            started_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
            generation: Generation(3),
            state: SavedState::Terminated { reason: EndReason::AppExited(137), at: SystemTime::UNIX_EPOCH },
            saved_at: SystemTime::UNIX_EPOCH,
            lived: Duration::from_secs(9),
            asleep: Duration::ZERO,
        }
    }

    fn used(running_seconds: f64) -> SavedUsage {
        SavedUsage { usage: Usage { running_seconds, ..Usage::default() }, stored_bytes: 7, saved_at: SystemTime::UNIX_EPOCH }
    }

    #[tokio::test]
    async fn what_was_put_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        let opened = Store::open(path.clone()).await.unwrap();
        assert!(opened.fresh && opened.records.is_empty());
        let (kept, changed, dropped) = (record(), record(), record());
        let later = Record { generation: Generation(4), state: SavedState::Suspended { reason: None }, ..changed.clone() };
        let usage = used(1.0);
        let puts = [&kept, &changed, &dropped].map(|record| opened.store.put(record, &usage));
        for put in futures::future::join_all(puts).await {
            put.unwrap();
        }
        opened.store.put(&later, &used(2.0)).await.unwrap();
        opened.store.put_usage(vec![(changed.id, used(3.0)), (dropped.id, used(4.0))]).await.unwrap();
        for _ in 0..2 {
            opened.store.delete(dropped.id, &dropped.image).await.unwrap();
        }
        opened.store.put_usage(vec![(dropped.id, used(5.0))]).await.unwrap();
        opened.store.close().await;
        assert!(opened.store.put(&kept, &usage).await.is_err(), "it was closed");

        let opened = Store::open(path).await.unwrap();
        assert!(!opened.fresh);
        assert_eq!(opened.records.len(), 2);
        assert!(opened.records.contains(&kept) && opened.records.contains(&later));
        assert_eq!(opened.usage, HashMap::from([(kept.id, used(1.0)), (changed.id, used(3.0))]));
        assert_eq!(opened.by_image, BTreeMap::from([(dropped.image, used(4.0).usage)]), "what a forgotten one used is its image's, once");
    }

    #[test]
    fn a_record_of_a_time_before_hooks_is_read() {
        let mut json = serde_json::to_value(record()).unwrap();
        for member in ["hooks", "run_due"] {
            assert!(json.as_object_mut().unwrap().remove(member).is_some());
        }
        let read: Record = serde_json::from_value(json).unwrap();
        assert_eq!((read.hooks, read.run_due), (None, None));
    }

    #[tokio::test]
    async fn a_file_of_a_newer_program_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction.open_table(META).unwrap().insert("schema", SCHEMA + 1).unwrap();
            transaction.commit().unwrap();
        }
        let before = std::fs::read(&path).unwrap();
        let Err(ControllerError::Registry { source, .. }) = Store::open(path.clone()).await else { panic!("it was opened") };
        assert!(source.to_string().contains("schema 2"), "{source}");
        assert_eq!(before.len(), std::fs::read(&path).unwrap().len());
    }

    #[tokio::test]
    async fn a_damaged_record_is_named_and_not_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        Store::open(path.clone()).await.unwrap().store.close().await;
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction.open_table(MICROVMS).unwrap().insert("microvm-1", b"{\"id\":3}".as_slice()).unwrap();
            transaction.commit().unwrap();
        }
        let Err(ControllerError::Registry { source, .. }) = Store::open(path).await else { panic!("it was opened") };
        assert!(source.to_string().contains("microvm-1"), "{source}");
    }
}
