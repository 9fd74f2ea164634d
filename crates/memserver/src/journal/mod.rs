//! What a server remembers of itself beside the pages: a journal of all that its tables say, so that
//! another process can go on where this one was killed.
//!
//! ```text
//! directory:   arena      the pages, mapped: what was written is there after a kill
//!              journal    appended to, mapped as well; rewritten when it is long
//!              journal.PID-N.new   one in the making, which counts once it is named journal
//!              lock       held by the server that uses the directory
//! ```
//!
//! Each change is in the journal before it is acknowledged, and before a place that it frees can be
//! used again. All that happens to one leaf is in the journal in its order: what is done to a leaf
//! that tables share is noted under the leaf's lock. The journal's own lock is the innermost one.
//!
//! The kernel keeps both files through the end of the process, not through the end of the machine.
//! So what another boot of the machine left behind counts as lost, unless the server was stopped in
//! order: then the disk has it.

mod aside;
mod record;
mod replay;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farmem_region::{ByteCount, Incarnation};
use farmem_vmem::{Arena, MappedLog};
use farmem_wire::crc32c;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

pub(crate) use self::aside::Anew;
use self::record::RECORD_BYTES_MAX;
pub(crate) use self::record::{
    FileIdentity, OwnRecord, PUT_BYTES, PageRecord, Record, SessionRecord, SourceRecord, Spot,
};
pub(crate) use self::replay::{About, OwnAbout, Past, PastSession, Shelved, replay};

const MAGIC: [u8; 8] = *b"FMJOURNL";
/// Versions of the journal's bytes, a line each. A server goes on with those from the oldest to its
/// own, and refuses to start on another one.
///
/// 1: sessions, blocks, pages, pins, shelves.
/// 2: sizes that shrink, preferences, who is a copy of whom, regions made from another server's.
/// 3: which pages are read first.
/// 4: ranges of clones' own that are not filled yet.
/// 5: which file each region is made from.
const VERSION: u32 = 5;
const OLDEST_VERSION: u32 = 1;
/// That of the records alone is the same one.
pub(crate) const RECORDS_VERSION: u32 = VERSION;
const HEADER_BYTES: usize = 64;
/// What of the header its checksum covers.
const COVERED_BYTES: usize = 60;

/// Bytes that a new journal needs beside what it says, at least, so that something can be noted in it.
const ROOM_TO_NOTE: u64 = 4 << 20;

/// A journal is rewritten when it is so many times longer than it was when it was last rewritten.
const LONG_TIMES: usize = 3;

/// How long a directory may still be in use by a server that is about to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why a server cannot use a directory for its data. What is in it stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The kernel says no.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Two servers would destroy each other's data.
    #[error("another server uses {}", .0.display())]
    InUse(PathBuf),
    /// The token of every session stands in the journal.
    #[error("{} is open to other users: give it mode 0700", .0.display())]
    Open(PathBuf),
    /// Written by another version of farmem.
    #[error("{} has version {found}, this program reads versions {OLDEST_VERSION} to {VERSION}: start the server's other \
             version, or remove the directory with all that it holds", path.display())]
    Version {
        /// The journal.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The data does not fit into what the server is to have now.
    #[error("the data in {} does not fit: {what}", path.display())]
    DoesNotFit {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
}

/// A directory that this process alone uses.
#[derive(Debug)]
pub(crate) struct DataDirectory {
    path: PathBuf,
    /// Locked as long as it is open here, or in a process that it was passed to.
    lock: File,
}

/// What a server left behind, or that it left nothing that can be used.
#[derive(Debug)]
pub(crate) struct Remains {
    /// The pages.
    pub(crate) arena: OwnedFd,
    pub(crate) slots: u32,
    /// The journal's bytes, and the file.
    pub(crate) said: Vec<u8>,
    pub(crate) file: OwnedFd,
    pub(crate) incarnation: Incarnation,
    /// Ids of sessions that may have been used.
    pub(crate) next_session: u64,
}

/// A journal that was replayed.
#[derive(Debug)]
pub(crate) struct OldJournal {
    pub(crate) file: OwnedFd,
    /// Where it ends.
    pub(crate) end: usize,
    pub(crate) was_stopped: bool,
    /// As it is to be from now on.
    pub(crate) header: JournalHeader,
}

/// What stands at the front of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JournalHeader {
    pub(crate) slots: u32,
    pub(crate) incarnation: Incarnation,
    /// Which boot of the machine wrote it.
    pub(crate) boot: [u8; 16],
    /// The arena's file, so that another one in its place is found out.
    pub(crate) arena: u64,
    pub(crate) next_session: u64,
}

impl JournalHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.slots.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.incarnation.get().to_le_bytes());
        bytes[24..40].copy_from_slice(&self.boot);
        bytes[40..48].copy_from_slice(&self.arena.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.next_session.to_le_bytes());
        let crc = crc32c(&bytes[..COVERED_BYTES]);
        bytes[COVERED_BYTES..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header, or the version that it has instead; `None` if it is none.
    fn decode(bytes: &[u8]) -> Option<Result<Self, u32>> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
        if bytes[..8] != MAGIC {
            return None;
        }
        if !(OLDEST_VERSION..=VERSION).contains(&u32_at(8)) {
            return Some(Err(u32_at(8)));
        }
        if crc32c(&bytes[..COVERED_BYTES]) != u32_at(COVERED_BYTES) {
            return None;
        }
        Some(Ok(Self {
            slots: u32_at(12),
            incarnation: Incarnation::new(u64_at(16)),
            boot: std::array::from_fn(|at| bytes[24 + at]),
            arena: u64_at(40),
            next_session: u64_at(48),
        }))
    }
}

impl DataDirectory {
    /// Takes a directory, which is made if there is none.
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| DataError::Io { what, path, source }
        };
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("make", path)(error));
            }
            _ => {}
        }
        let mode = fs::metadata(path).map_err(failed("look at", path))?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(DataError::Open(path.to_owned()));
        }
        let name = path.join("lock");
        let lock =
            private().create(true).truncate(false).open(&name).map_err(failed("open", &name))?;
        match lock_patiently(&lock) {
            Ok(()) => {
                let directory = Self { path: path.to_owned(), lock };
                directory.remove_unfinished("journal.");
                Ok(directory)
            }
            Err(Errno::WOULDBLOCK) => Err(DataError::InUse(path.to_owned())),
            Err(errno) => Err(failed("lock", &name)(errno.into())),
        }
    }

    /// Takes a directory of which another process has passed the lock; `None` if that is the lock of
    /// another one.
    pub(crate) fn adopt(path: &Path, lock: OwnedFd) -> Option<Self> {
        let lock = File::from(lock);
        let (passed, found) = (lock.metadata().ok()?, fs::metadata(path.join("lock")).ok()?);
        let is_same = (passed.dev(), passed.ino()) == (found.dev(), found.ino());
        is_same.then(|| Self { path: path.to_owned(), lock })
    }

    /// What a server left behind here. `Ok(Err(reason))` if it left data that is lost; no reason if
    /// it left nothing.
    pub(crate) fn remains(&self) -> Result<Result<Remains, Option<String>>, DataError> {
        let lost = |reason: &str| Ok(Err(Some(reason.to_owned())));
        let path = self.path.join("journal");
        let mut file = match private().open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(None)),
            Err(source) => return Err(DataError::Io { what: "open", path, source }),
        };
        let mut said = Vec::new();
        if let Err(source) = file.read_to_end(&mut said) {
            return Err(DataError::Io { what: "read", path, source });
        }
        let header = match JournalHeader::decode(&said) {
            Some(Ok(header)) => header,
            Some(Err(found)) => return Err(DataError::Version { path, found }),
            None => return lost("its journal is damaged"),
        };
        let Ok(arena) = private().open(self.path.join("arena")) else {
            return lost("the file of its pages is gone");
        };
        let Ok(about) = arena.metadata() else {
            return lost("the file of its pages cannot be looked at");
        };
        if about.ino() != header.arena || about.len() < Arena::file_bytes(header.slots) {
            return lost("the file of its pages is another one, or shorter");
        }
        if !is_this_boot(&header.boot, &boot()) && !replay::was_stopped(&said[HEADER_BYTES..]) {
            return lost("the machine has ended since, and the server had not been stopped before");
        }
        let JournalHeader { slots, incarnation, next_session, .. } = header;
        let (arena, file) = (arena.into(), file.into());
        Ok(Ok(Remains { arena, slots, said, file, incarnation, next_session }))
    }

    /// A new file for pages, in place of a former one.
    pub(crate) fn new_arena(&self, slots: u32) -> Result<OwnedFd, DataError> {
        let path = self.path.join("arena");
        let make = || {
            let made = private().create(true).truncate(true).open(&path)?;
            made.set_len(Arena::file_bytes(slots))?;
            Ok(made.into())
        };
        make().map_err(|source| DataError::Io { what: "make", path: path.clone(), source })
    }

    /// Makes the file for pages longer.
    pub(crate) fn grow_arena(&self, arena: &OwnedFd, slots: u32) -> Result<(), DataError> {
        rustix::fs::ftruncate(arena, Arena::file_bytes(slots)).map_err(|errno| DataError::Io {
            what: "lengthen",
            path: self.path.join("arena"),
            source: errno.into(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Journals that former processes did not come to put in place, whose names begin so. Nobody else makes one: a
    /// process that one is being handed over to has the lock too.
    fn remove_unfinished(&self, start: &str) {
        let files = fs::read_dir(&self.path).into_iter().flatten().flatten();
        let is_unfinished = |name: &str| name.starts_with(start) && name.ends_with(".new");
        for file in files.filter(|file| file.file_name().to_str().is_some_and(is_unfinished)) {
            // It takes room, and harms nobody.
            let _ = fs::remove_file(file.path());
        }
    }

    /// Writes a journal that does not count yet.
    fn write_journal(&self, bytes: &[u8]) -> io::Result<Unfinished> {
        // During a hand-over two processes have the directory: under one name, one would write over what the
        // other has put in place. Whatever the numbers, nobody writes to a file that is there.
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("journal.{}-{number}-{:x}.new", std::process::id(), clock());
        let path = self.path.join(name);
        let file = private().create_new(true).open(&path)?;
        let mut unfinished = Unfinished { path: Some(path), file: file.into() };
        unfinished.write(bytes)?;
        Ok(unfinished)
    }
}

/// Journals that this process has made.
static MADE: AtomicU64 = AtomicU64::new(0);

/// Tells processes with the same number, one after the other or in containers, from each other.
fn clock() -> u128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos())
}

/// A journal that does not count yet. Removed if it never does.
#[derive(Debug)]
struct Unfinished {
    /// Until it is in place.
    path: Option<PathBuf>,
    file: OwnedFd,
}

impl Unfinished {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::from(self.file.try_clone()?);
        file.write_all(bytes)
    }

    /// Puts it in place of the former one, at once. Does nothing if it is.
    fn put(&mut self) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, path.with_file_name("journal"))?;
            self.path = None;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// Locks a file that a server which is about to end may still have.
///
/// # Errors
/// `WOULDBLOCK` if somebody else has it.
pub(crate) fn lock_patiently(file: impl AsFd) -> Result<(), Errno> {
    let began = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if began.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_PAUSE);
            }
            result => return result,
        }
    }
}

/// For the server's user alone.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// Which boot of the machine this is; zeros if nobody knows.
pub(crate) fn boot() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0).to_le_bytes()
}

/// Whether what another process noted at one boot was noted at this one. Of one that is not known nobody can say so.
fn is_this_boot(then: &[u8; 16], now: &[u8; 16]) -> bool {
    then == now && *now != [0; 16]
}

/// Where changes are noted. `None` in a server that keeps nothing.
#[derive(Debug)]
pub(crate) struct Journal {
    directory: DataDirectory,
    log: Mutex<Log>,
    /// Until [`Journal::put`], in one that was prepared.
    unfinished: Mutex<Option<Unfinished>>,
    /// Whether its disk is full: then nothing new is taken on.
    is_short: AtomicBool,
    /// As if it was.
    #[cfg(test)]
    pub(crate) seems_short: AtomicBool,
    /// As if there was no room for a new one.
    #[cfg(test)]
    pub(crate) seems_full: AtomicBool,
}

#[derive(Debug)]
struct Log {
    file: MappedLog,
    bytes: Vec<u8>,
    /// How long it was when it was last rewritten.
    was: usize,
    /// Whether something could not be noted: the journal is gone then.
    is_broken: bool,
}

impl Journal {
    /// Goes on with a journal that was replayed.
    pub(crate) fn resume(directory: DataDirectory, old: OldJournal) -> Result<Self, DataError> {
        let path = directory.path.join("journal");
        let OldJournal { file, end, was_stopped, header } = old;
        let resumed = (|| {
            // What was torn when the former process was killed must not look like a record later.
            let file = File::from(file);
            file.write_all_at(&[0; 2 * RECORD_BYTES_MAX], end as u64)?;
            // This boot of the machine may change the pages from now on. In this order: between the
            // two, nothing has changed yet.
            file.write_all_at(&header.encode(), 0)?;
            let mut log = MappedLog::new(file.into(), end)?;
            if was_stopped {
                let mut bytes = Vec::new();
                Record::Started.encode(&mut bytes);
                let _ = log.append(&bytes);
                rustix::fs::fsync(log.file())?;
            }
            Ok(log)
        })();
        let file = resumed.map_err(|source| DataError::Io { what: "go on with", path, source })?;
        Ok(Self::over(directory, file))
    }

    /// Begins a new journal, with what is known now.
    pub(crate) fn create(
        directory: DataDirectory,
        header: &JournalHeader,
        records: &[u8],
    ) -> Result<Self, DataError> {
        let journal = Self::prepare(directory, header, records)?;
        journal.put()?;
        Ok(journal)
    }

    /// As [`Journal::create`], but it does not count before [`Journal::put`].
    pub(crate) fn prepare(
        directory: DataDirectory,
        header: &JournalHeader,
        records: &[u8],
    ) -> Result<Self, DataError> {
        let path = directory.path.join("journal");
        let bytes = [&header.encode()[..], records].concat();
        let made = directory.write_journal(&bytes).and_then(|made| {
            let file = MappedLog::new(made.file.try_clone()?, bytes.len())?;
            Ok((made, file))
        });
        let (made, file) = made.map_err(|source| DataError::Io { what: "make", path, source })?;
        let journal = Self::over(directory, file);
        *journal.unfinished() = Some(made);
        Ok(journal)
    }

    /// From now on this is the journal of its directory.
    pub(crate) fn put(&self) -> Result<(), DataError> {
        let path = self.directory.path.join("journal");
        let put = self.unfinished().as_mut().map_or(Ok(()), Unfinished::put);
        put.map_err(|source| DataError::Io { what: "put in place", path, source })
    }

    /// Whether this is the journal of its directory.
    pub(crate) fn is_in_place(&self) -> bool {
        let log = self.log();
        let found = fs::metadata(self.directory.path.join("journal"));
        let own = rustix::fs::fstat(log.file.file());
        matches!((found, own), (Ok(found), Ok(own)) if found.ino() == own.st_ino)
    }

    /// Removes what a process that is no more was about to put in place.
    pub(crate) fn remove_unfinished_of(&self, process: u32) {
        self.directory.remove_unfinished(&format!("journal.{process}-"));
    }

    /// The lock of its directory.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.directory.lock.as_fd()
    }

    fn over(directory: DataDirectory, file: MappedLog) -> Self {
        let log = Log { was: file.len(), file, bytes: Vec::new(), is_broken: false };
        Self {
            directory,
            log: Mutex::new(log),
            unfinished: Mutex::new(None),
            is_short: AtomicBool::new(false),
            #[cfg(test)]
            seems_short: AtomicBool::new(false),
            #[cfg(test)]
            seems_full: AtomicBool::new(false),
        }
    }

    /// Notes something. It is there once this returns.
    pub(crate) fn note(&self, record: &Record<'_>) {
        let mut log = self.log();
        let Log { file, bytes, is_broken, .. } = &mut *log;
        if *is_broken {
            return;
        }
        bytes.clear();
        record.encode(bytes);
        if file.append(bytes) {
            self.is_short.store(file.is_short(), Ordering::Relaxed);
        } else {
            let _ = self.disown(&mut log);
        }
    }

    /// What stands in the directory is not true any more, and cannot be written anew: whoever comes next must
    /// not believe it.
    ///
    /// # Errors
    /// If it cannot be removed: then it would be believed.
    pub(crate) fn give_up(&self) -> io::Result<()> {
        self.disown(&mut self.log())
    }

    fn disown(&self, log: &mut Log) -> io::Result<()> {
        log.is_broken = true;
        match fs::remove_file(self.directory.path.join("journal")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Looks whether there is room by now.
    pub(crate) fn look_again(&self) {
        let mut log = self.log();
        if !log.is_broken {
            // It grows by the way.
            let _ = log.file.append(&[]);
            self.is_short.store(log.file.is_short(), Ordering::Relaxed);
        }
    }

    /// Bytes that were noted.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.log().file.len()
    }

    /// Whether something could not be noted.
    pub(crate) fn is_broken(&self) -> bool {
        self.log().is_broken
    }

    /// Whether there is hardly any room to note more: nothing new is to be taken on.
    pub(crate) fn is_short(&self) -> bool {
        #[cfg(test)]
        if self.seems_short.load(Ordering::Relaxed) {
            return true;
        }
        self.is_short.load(Ordering::Relaxed)
    }

    /// Whether it is longer than `least` and worth being rewritten.
    pub(crate) fn is_long(&self, least: ByteCount) -> bool {
        let log = self.log();
        let long = log.was.saturating_mul(LONG_TIMES) as u64;
        log.file.len() as u64 > long.max(least.get()) && !log.is_broken
    }

    /// Whether a new one that says so much may fit beside this one. If it does not, this one does not count as long
    /// again at once.
    pub(crate) fn has_room_for(&self, bytes: u64) -> bool {
        let wanted = bytes.saturating_add(ROOM_TO_NOTE);
        let has_room = aside::free(&self.directory.path).is_none_or(|free| free >= wanted);
        #[cfg(test)]
        let has_room = has_room && !self.seems_full.load(Ordering::Relaxed);
        if !has_room {
            let mut log = self.log();
            log.was = log.file.len();
        }
        has_room
    }

    /// Rewrites the journal as what `tell` appends. Nothing is noted meanwhile. If that fails, the former one
    /// goes on.
    pub(crate) fn rewrite(
        &self,
        header: &JournalHeader,
        tell: impl FnOnce(&mut Vec<u8>),
    ) -> io::Result<()> {
        let mut log = self.log();
        let mut bytes = header.encode().to_vec();
        tell(&mut bytes);
        // Not again at once if it fails.
        log.was = log.file.len();
        #[cfg(test)]
        if self.seems_full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let mut made = self.directory.write_journal(&bytes)?;
        // Before it counts: one in which nothing can be noted is of no use.
        let file = MappedLog::new(made.file.try_clone()?, bytes.len())?;
        made.put()?;
        (log.file, log.was) = (file, bytes.len());
        // It says all that is known, also where one before it could not.
        log.is_broken = false;
        self.is_short.store(log.file.is_short(), Ordering::Relaxed);
        Ok(())
    }

    /// Says that all is on the disk. Nothing is noted afterwards.
    pub(crate) fn stop(&self, arena: &Arena) -> io::Result<()> {
        rustix::fs::fsync(arena.descriptor())?;
        self.note(&Record::Stopped);
        rustix::fs::fsync(self.log().file.file())?;
        let directory = File::open(&self.directory.path)?;
        Ok(rustix::fs::fsync(&directory)?)
    }

    fn unfinished(&self) -> MutexGuard<'_, Option<Unfinished>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a journal says, without its header.
pub(crate) fn records(said: &[u8]) -> &[u8] {
    &said[HEADER_BYTES..]
}

/// Where in the file the record at a place of [`records`] stands.
pub(crate) const fn offset(at: usize) -> usize {
    HEADER_BYTES + at
}

#[cfg(test)]
mod tests {
    use farmem_region::RegionId;

    use super::*;

    const HEADER: JournalHeader = JournalHeader {
        slots: 1,
        incarnation: Incarnation::new(7),
        boot: [1; 16],
        arena: 3,
        next_session: 9,
    };

    fn names(path: &Path) -> Vec<String> {
        let files = fs::read_dir(path).unwrap().map(|file| file.unwrap().file_name());
        let mut names: Vec<_> = files.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn said(path: &Path) -> Vec<RegionId> {
        let said = fs::read(path.join("journal")).unwrap();
        let (mut rest, mut ends) = (records(&said), Vec::new());
        while let Ok((record, bytes)) = Record::decode(rest) {
            let Record::End(region) = record else { panic!("{record:?}") };
            ends.push(region);
            rest = &rest[bytes..];
        }
        ends
    }

    #[test]
    fn a_boot_that_nobody_knows_is_another_one() {
        let known = [7; 16];
        assert!(is_this_boot(&known, &known) && !is_this_boot(&known, &[8; 16]));
        for (then, now) in [([0; 16], [0; 16]), ([0; 16], known), (known, [0; 16])] {
            assert!(!is_this_boot(&then, &now));
        }
        assert_ne!(boot(), [0; 16]);
    }

    /// A process that was to take over and is late writes its journal, and whatever else, while the one that goes
    /// on writes its own.
    #[test]
    fn cap_95_two_processes_write_journals_apart() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("data");
        let directory = DataDirectory::open(&path).unwrap();
        let lock = directory.lock.try_clone().unwrap();
        let ends = |number| Record::End(RegionId::new(number));
        let journal = Journal::create(directory, &HEADER, &[]).unwrap();
        let prepare = || {
            let lock = lock.try_clone().unwrap().into();
            Journal::prepare(DataDirectory::adopt(&path, lock).unwrap(), &HEADER, &[]).unwrap()
        };
        let late = prepare();
        journal.rewrite(&HEADER, |out| ends(1).encode(out)).unwrap();
        journal.note(&ends(2));
        late.note(&ends(100));
        let later = prepare();
        later.note(&ends(101));
        journal.note(&ends(3));
        assert_eq!(said(&path), [1, 2, 3].map(RegionId::new));
        drop(late);
        later.put().unwrap();
        later.note(&ends(102));
        assert!(!journal.is_in_place() && later.is_in_place());
        assert_eq!(said(&path), [101, 102].map(RegionId::new));
        assert_eq!(names(&path), ["journal", "lock"]);
        // What nobody came to put in place is removed by who comes next.
        std::mem::forget(prepare());
        assert_eq!(names(&path).len(), 3);
        later.remove_unfinished_of(std::process::id() / 10);
        assert_eq!(names(&path).len(), 3, "another process has made it");
        later.remove_unfinished_of(std::process::id());
        assert_eq!(names(&path), ["journal", "lock"]);
        std::mem::forget(prepare());
        drop((journal, later));
        rustix::fs::flock(&lock, FlockOperation::Unlock).unwrap();
        DataDirectory::open(&path).unwrap();
        assert_eq!(names(&path), ["journal", "lock"]);
    }
}
