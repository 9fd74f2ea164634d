//! What a former process knew becomes what this one knows; and what is noted so that a later one
//! can know it too.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use farmem_region::{
    BlockId, ByteCount, Epoch, Incarnation, Nanos, PAGE_SIZE, PageCount, PageIndex, PageRange,
    RegionId, SessionId,
};
use farmem_vmem::Arena;
use farmem_wire::RefusalCode;

use super::tier_file::{
    file_tier, former_file_tier, missing_in_file, no_tier, rename_tier, tier_path,
};
use super::{BlockIds, Engine, Sessions, lock, random};
use crate::backing::{BackingFile, OpenFiles};
use crate::config::ServerConfig;
use crate::handover::{Given, HandOverError, Handed};
use crate::journal::{
    self, About, Anew, DataDirectory, DataError, FileIdentity, Journal, JournalHeader, OldJournal,
    OwnAbout, OwnRecord, Past, PastSession, Record, Remains, SessionRecord, SourceRecord, Spot,
};
use crate::leases::Leases;
use crate::log::{LogLevel, LogLine};
use crate::page_set::PageSet;
use crate::region::{OwnRange, Region, Source, block_pages};
use crate::server::ServerError;
use crate::session::Session;
use crate::table::{self, LEAF_PAGES};
use crate::tiers::{FileLacks, FileTier, RestoreError, Tiers};

/// What a server begins with.
pub(super) struct Revived {
    pub(super) tiers: Tiers,
    pub(super) incarnation: Incarnation,
    pub(super) sessions: Sessions,
    pub(super) tally: Tally,
    pub(super) files: OpenFiles,
    /// Sessions of which an older journal does not say which file they are made from: to be noted anew, or one
    /// that takes its place later would be taken for it.
    pub(super) unidentified: Vec<SessionId>,
    /// What the former process was killed in and did not come to note: to be noted first.
    mends: Vec<Record<'static>>,
}

impl Revived {
    /// Everything is noted in a journal from now on.
    fn keep_journal(&mut self, journal: Journal) {
        std::mem::take(&mut self.mends).iter().for_each(|mend| journal.note(mend));
        self.tiers.keep_journal(journal);
    }
}

/// Sums over all sessions.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) granted: ByteCount,
    pub(super) orphans: u64,
    pub(super) pages: u64,
    pub(super) pinned: u64,
    /// Above those that clients of a former process know.
    pub(super) next_connection: u64,
}

/// A server that holds nothing, or all that one has left in its directory.
pub(super) fn revive(config: &ServerConfig) -> Result<Revived, ServerError> {
    let no_arena = |source| ServerError::Arena { memory: config.memory, source };
    let slots = slots(config)?;
    let Some(path) = &config.data else {
        let tiers = Arena::new(slots).and_then(|arena| Tiers::new(arena, &config.tiers));
        return empty(tiers.map_err(no_arena)?).map_err(no_arena);
    };
    let directory = DataDirectory::open(path)?;
    let lost = match directory.remains()? {
        Ok(remains) => match resume(config, &directory, remains, slots)? {
            Ok((mut revived, past)) => {
                revived.keep_journal(Journal::resume(directory, past)?);
                return Ok(revived);
            }
            Err(reason) => Some(reason),
        },
        Err(reason) => reason,
    };
    if let Some(reason) = lost {
        let tier = tier_path(config, &directory);
        let size = config.tiers.file.as_ref().map_or(0, |tier| tier.size.get());
        let kept = directory.set_aside(&Anew {
            arena: Arena::file_bytes(slots),
            tier: tier.as_deref().map(|path| (path, size)),
            left: config.memory_left.as_ref(),
        })?;
        let message = format_args!(
            "what the former server held in {} is lost: {reason}; its clients will be told, this \
             server is a new incarnation; {kept}",
            path.display()
        );
        config.log.line(&LogLine::new(LogLevel::Error, "contents_lost", message));
    }
    let arena = directory.new_arena(slots)?;
    let header = header(slots, &arena, random().map_err(no_arena)?, 1);
    let arena = Arena::over(arena, slots, true).map_err(no_arena)?;
    let file = file_tier(config, Some(&directory), true);
    let file = file.map_err(|error| no_tier(config, &directory, error))?;
    let tiers = Tiers::over(arena, &config.tiers, file);
    let mut revived = empty(tiers).map_err(no_arena)?;
    revived.incarnation = header.incarnation;
    revived.keep_journal(Journal::create(directory, &header, &[])?);
    Ok(revived)
}

/// Slots of a server's arena.
fn slots(config: &ServerConfig) -> Result<u32, ServerError> {
    let beyond = config.limits.inflight_bytes.pages_rounded_up().get();
    let slots = config.memory.get() / PAGE_SIZE as u64 + beyond;
    u32::try_from(slots).map_err(|_| {
        let text = "a server lends at most 16 TiB";
        let source = io::Error::new(io::ErrorKind::InvalidInput, text);
        ServerError::Arena { memory: config.memory, source }
    })
}

/// A server that holds what a running one has handed over, and changes none of it yet.
pub(super) fn take_over(
    config: &ServerConfig,
    handed: &mut Handed,
) -> Result<Revived, ServerError> {
    let does_not_fit = |text: String| ServerError::from(HandOverError::DoesNotFit(text));
    let given = handed.given;
    let directory = adopted_directory(config, handed.lock.take()).map_err(does_not_fit)?;
    let arena = handed.arena.take().ok_or(HandOverError::NotUnderstood)?;
    let slots = slots_of(config, &given, directory.as_ref(), &arena)?;
    let no_arena = |source| ServerError::Arena { memory: config.memory, source };
    let arena = Arena::over(arena, slots, directory.is_some()).map_err(no_arena)?;
    let file = match (&config.tiers.file, handed.file.take()) {
        (Some(tier), Some(file)) => Some(FileTier::over(file, tier)),
        // What was in the file is asked for below.
        (None, _) => None,
        (Some(_), None) => file_tier(config, directory.as_ref(), true).map_err(no_arena)?,
    };
    let mut tiers = Tiers::over(arena, &config.tiers, file);
    tiers.begin_replay();
    let records = std::mem::take(&mut handed.records);
    let past = journal::replay(&records, &tiers)
        .map_err(|reason| does_not_fit(format!("what was handed over cannot be read: {reason}")))?;
    if past.end != records.len() {
        return Err(does_not_fit("what was handed over cannot be read whole".to_owned()));
    }
    let incarnation = given.incarnation;
    let revived = restore(config, tiers, past, (incarnation, given.next_session), || None);
    let mut revived = revived.map_err(|error| match error {
        RestoreError::File(FileLacks::File) => does_not_fit(
            "the running server has pages in a file: give it the same --tier file=DIR:SIZE, or \
             a larger one"
                .to_owned(),
        ),
        _ => does_not_fit(
            "its pages do not fit: give it tiers at least as large as it has".to_owned(),
        ),
    })?;
    if let Some(directory) = directory {
        let arena = revived.tiers.arena.descriptor();
        let header = header(slots, &arena, incarnation.get(), revived.sessions.next);
        revived.keep_journal(Journal::prepare(directory, &header, &records)?);
    }
    Ok(revived)
}

/// The directory for data, which is to be the one that the running server has, if it has one.
fn adopted_directory(
    config: &ServerConfig,
    lock: Option<OwnedFd>,
) -> Result<Option<DataDirectory>, String> {
    match (&config.data, lock) {
        (None, None) => Ok(None),
        (Some(path), Some(lock)) => DataDirectory::adopt(path, lock).map(Some).ok_or_else(|| {
            let path = path.display();
            format!("{path} is not the directory that the running server uses: --data stays")
        }),
        (None, Some(_)) => Err("the running server has --data: give the same directory".to_owned()),
        (Some(_), None) => Err("the running server has no --data, which cannot be given to it \
                                later: leave it out, or stop the server and start it anew"
            .to_owned()),
    }
}

/// Slots of an arena that is handed over: it can become larger if it is a file with a name.
fn slots_of(
    config: &ServerConfig,
    given: &Given,
    directory: Option<&DataDirectory>,
    arena: &OwnedFd,
) -> Result<u32, ServerError> {
    let memory = given.memory.get();
    let text = match directory {
        Some(directory) if config.memory >= given.memory => {
            let slots = slots(config)?.max(given.slots);
            if slots > given.slots {
                directory.grow_arena(arena, slots)?;
            }
            return Ok(slots);
        }
        None if config.memory == given.memory => return Ok(given.slots),
        Some(_) => format!("the running server has --memory {memory}: give it at least that"),
        None => format!(
            "the running server has --memory {memory}, which without --data cannot change: leave \
             it out"
        ),
    };
    Err(HandOverError::DoesNotFit(text).into())
}

fn empty(tiers: Tiers) -> io::Result<Revived> {
    let blocks = BlockIds::default();
    let sessions = Sessions { by_id: BTreeMap::new(), names: HashMap::new(), next: 1, blocks };
    let tally = Tally { next_connection: 1, ..Tally::default() };
    let (incarnation, mends) = (Incarnation::new(random()?), Vec::new());
    let (files, unidentified) = (OpenFiles::default(), Vec::new());
    Ok(Revived { tiers, incarnation, sessions, tally, files, unidentified, mends })
}

fn header(
    slots: u32,
    arena: &impl std::os::fd::AsFd,
    incarnation: u64,
    next_session: u64,
) -> JournalHeader {
    JournalHeader {
        slots,
        incarnation: Incarnation::new(incarnation),
        boot: journal::boot(),
        // 0 matches no file.
        arena: rustix::fs::fstat(arena).map_or(0, |about| about.st_ino),
        next_session,
    }
}

/// A revived server with the journal that it goes on with, or why all is lost.
type Resumed = Result<(Revived, OldJournal), String>;

fn resume(
    config: &ServerConfig,
    directory: &DataDirectory,
    remains: Remains,
    slots: u32,
) -> Result<Resumed, ServerError> {
    let path = || directory.path().to_owned();
    let (now, then) = (Arena::file_bytes(slots), Arena::file_bytes(remains.slots));
    if now < then {
        let memory = PageCount::new(u64::from(remains.slots)).bytes().get()
            - config.limits.inflight_bytes.get();
        let what = format!("it was written with --memory {memory}: give it at least that");
        return Err(DataError::DoesNotFit { path: path(), what }.into());
    }
    if now > then {
        directory.grow_arena(&remains.arena, slots)?;
    }
    let no_arena = |source| ServerError::Arena { memory: config.memory, source };
    let arena = Arena::over(remains.arena, slots, true).map_err(no_arena)?;
    let file = match file_tier(config, Some(directory), false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        file => file.map_err(|error| no_tier(config, directory, error))?,
    };
    let mut tiers = Tiers::over(arena, &config.tiers, file);
    tiers.begin_replay();
    let past = match journal::replay(journal::records(&remains.said), &tiers) {
        Ok(past) => past,
        Err(reason) => return Ok(Err(reason)),
    };
    let old = OldJournal {
        file: remains.file,
        end: journal::offset(past.end),
        was_stopped: past.was_stopped,
        header: header(
            slots,
            &tiers.arena.descriptor(),
            remains.incarnation.get(),
            remains.next_session,
        ),
    };
    let next = (remains.incarnation, remains.next_session);
    match restore(config, tiers, past, next, || former_file_tier(config, directory)) {
        Ok(mut revived) => {
            if !revived.tiers.has_file() {
                let file = file_tier(config, Some(directory), true);
                revived.tiers.keep_file(file.map_err(|error| no_tier(config, directory, error))?);
            }
            rename_tier(config, directory, &revived.tiers);
            Ok(Ok((revived, old)))
        }
        Err(RestoreError::File(lacks)) => {
            let what = missing_in_file(lacks, tier_path(config, directory));
            Err(DataError::DoesNotFit { path: path(), what }.into())
        }
        Err(error) => Ok(Err(format!("its pages are not where its journal says ({error})"))),
    }
}

/// What stands in a journal, in its places. `former_file` is asked for if pages lie in a file that is not there.
fn restore(
    config: &ServerConfig,
    mut tiers: Tiers,
    mut past: Past,
    (incarnation, next_session): (Incarnation, u64),
    former_file: impl FnOnce() -> Option<FileTier>,
) -> Result<Revived, RestoreError> {
    let mends = mend(config, &tiers, &mut past.sessions);
    let mut spots = Vec::new();
    each_leaf(past.sessions.values().map(|session| &session.table), |leaf| {
        spots.extend(leaf.portions.iter().map(|(_, portion)| portion.place.spot()));
    });
    if !tiers.has_file() && spots.iter().any(|spot| matches!(spot, Spot::File(_))) {
        tiers.keep_file(former_file());
    }
    tiers.restore(&past.shelves, spots.into_iter())?;
    // Clients of the former process may name their connections, whose numbers were smaller.
    let next_connection = 1 << 40 | u64::from((random()? >> 32) as u32) << 8;
    let mut tally = Tally { next_connection, ..Tally::default() };
    let next = past.next_session.max(next_session);
    let mut sessions = Sessions {
        by_id: BTreeMap::new(),
        names: HashMap::new(),
        next,
        blocks: BlockIds::default(),
    };
    let mut files = Files::default();
    let (mut descended, mut unidentified) = (Vec::new(), Vec::new());
    let mut taken = BTreeSet::new();
    for (id, past) in past.sessions {
        taken.extend(past.blocks.iter().copied());
        let (parent, is_identified) = (past.parent, is_identified(&past.about));
        // Whatever clients were told of the former count lies elsewhere.
        let session = session(config, id, past, random()? >> 1, &mut files);
        if let Some(parent) = parent {
            descended.push((session.id, SessionId::new(parent.get())));
        }
        if !is_identified {
            unidentified.push(session.id);
        }
        tally.granted = ByteCount::new(tally.granted.get() + session.granted.get());
        tally.orphans += u64::from(session.orphaned_since.is_some());
        tally.pages += session.region.table.stored().get();
        tally.pinned += session.region.pins.pages().get();
        if session.is_resident {
            sessions.names.insert(session.name.clone(), session.id);
        }
        let file = match &session.region.source {
            Source::File(file) if session.region.depends_on_original() => Some(Arc::clone(file)),
            _ => None,
        };
        let id = session.id;
        let shared = Arc::new(Mutex::new(session));
        if let Some(file) = file {
            file.add_copy(Arc::downgrade(&shared));
        }
        sessions.by_id.insert(id, shared);
    }
    tell_descent(&sessions, &descended);
    let end = taken.last().map_or(0, |last| last + 1);
    let free = (0..end).filter(|block| !taken.contains(block)).collect();
    sessions.blocks = BlockIds { next: end, free };
    let files = files.open;
    Ok(Revived { tiers, incarnation, sessions, tally, files, unidentified, mends })
}

/// Does or undoes what the former process was killed in; returns what it did not come to note.
fn mend(
    config: &ServerConfig,
    tiers: &Tiers,
    sessions: &mut BTreeMap<RegionId, PastSession>,
) -> Vec<Record<'static>> {
    // Work of the former process that nobody will finish.
    let is_over =
        |session: &PastSession| session.about.record.flags & SessionRecord::TEMPORARY != 0;
    // A region that took another one's place may have been noted before that one's end.
    let mut latest = HashMap::new();
    for (id, session) in sessions.iter().filter(|(_, session)| !is_over(session)) {
        if session.about.record.flags & SessionRecord::RESIDENT != 0 {
            latest.insert(session.about.name.clone(), *id);
        }
    }
    let mut mends = Vec::new();
    sessions.retain(|id, session| {
        let is_resident = session.about.record.flags & SessionRecord::RESIDENT != 0;
        let stays =
            !is_over(session) && (!is_resident || latest.get(&session.about.name) == Some(id));
        if !stays {
            // Or it would be back once the one that took its place is gone.
            mends.push(Record::End(*id));
        }
        stays
    });
    for (id, session) in sessions {
        cut(config, tiers, *id, session, &mut mends);
    }
    mends
}

/// A region is as large as it is said to be: what is beyond is still there if the process was killed while
/// it changed that.
fn cut(
    config: &ServerConfig,
    tiers: &Tiers,
    id: RegionId,
    session: &mut PastSession,
    mends: &mut Vec<Record<'static>>,
) {
    let pages = session.about.record.pages;
    let (start, count) = (PageIndex::new(pages), PageCount::new(u64::MAX - pages));
    let (region, range) = (id, PageRange { start, count });
    if session.table.holds_from(start) {
        // Nobody counts its places yet.
        session.table.remove(tiers, range, &mut Vec::new());
        mends.push(Record::Remove { region, range });
    }
    let preferred = session.prefers.clone();
    session.prefers.set(range, None);
    if session.prefers != preferred {
        mends.push(Record::Prefer { region, range, tier: None });
    }
    let blocks = usize::try_from(pages.div_ceil(block_pages(config))).unwrap_or(usize::MAX);
    if session.blocks.len() > blocks {
        session.blocks.truncate(blocks);
        // No region has as many blocks as 32 bits count.
        let keep = u32::try_from(blocks).unwrap_or(u32::MAX);
        mends.push(Record::KeepBlocks { region, keep });
    }
}

/// Says who is whose copy.
fn tell_descent(sessions: &Sessions, descended: &[(SessionId, SessionId)]) {
    for (id, parent) in descended {
        // Where the original is gone it is a copy of nothing.
        if let (Some(copy), Some(original)) = (sessions.by_id.get(id), sessions.by_id.get(parent)) {
            lock(copy).region.descend_from(&lock(original).region);
        }
    }
}

/// Files that were opened again.
#[derive(Default)]
struct Files {
    by_range: HashMap<(String, u64, FileIdentity), Arc<BackingFile>>,
    open: OpenFiles,
}

/// Whether what was opened is the file that it was. Its number alone tells where nobody knows when it was born.
const fn is_it(then: FileIdentity, now: FileIdentity) -> bool {
    match (then, now) {
        (Some((born, inode)), Some((found, number))) => {
            inode == number && (born == found || born == 0 || found == 0)
        }
        _ => true,
    }
}

fn is_identified(about: &About) -> bool {
    let source = match about.record.source {
        SourceRecord::File { identity, .. } | SourceRecord::Server { identity, .. } => {
            identity.is_some()
        }
        SourceRecord::Nothing | SourceRecord::Fill(_) => true,
    };
    source && about.own.as_ref().is_none_or(|own| own.identity.is_some())
}

fn session(
    config: &ServerConfig,
    id: RegionId,
    past: PastSession,
    count: u64,
    files: &mut Files,
) -> Session {
    let PastSession { about, blocks, pins, prefers, parent: _, table, mut working_set } = past;
    let record = about.record;
    let has = |flag| record.flags & flag != 0;
    let pages = PageCount::new(record.pages);
    let source = source(config, &about, files);
    let own = about.own.as_ref().map(|OwnAbout { path, offset, identity }| {
        let range = (path.as_str(), *offset, *identity);
        let file = reopen(config, &about.name, range, pages.bytes().get(), files);
        // What of it was written before is written again: nobody knows whether the disk has it.
        OwnRange { file, held: PageSet::default() }
    });
    let mut region = Region::new(id);
    region.epoch = Epoch::new(record.epoch);
    region.pages = pages;
    region.blocks = blocks.into_iter().map(BlockId::new).collect();
    region.set_page_bytes(record.page_bytes);
    region.table = table;
    region.table.count_from(count);
    region.source = source;
    region.is_frozen = has(SessionRecord::FROZEN);
    region.copies_on_access = has(SessionRecord::COPIES_ON_ACCESS);
    region.writes_back = has(SessionRecord::WRITES_BACK);
    region.own = own;
    region.has_own_range = has(SessionRecord::HAS_OWN_RANGE);
    region.generation = record.generation;
    region.pins = pins;
    region.prefers = prefers;
    working_set.begin_spell();
    region.working_set = working_set;
    let is_resident = has(SessionRecord::RESIDENT);
    Session {
        id: SessionId::new(id.get()),
        token: record.token,
        name: about.name,
        granted: ByteCount::new(record.granted),
        dynamic: has(SessionRecord::DYNAMIC),
        region,
        is_resident,
        is_temporary: false,
        traffic: Arc::default(),
        attached: Vec::new(),
        leases: Leases::after_restart(Instant::now()),
        // The time that its client has begins anew.
        orphaned_since: (!is_resident).then_some(Nanos::new(0)),
        assigned: HashMap::new(),
        ended: false,
    }
}

/// What a region is made from. A file is opened again once, however many regions are made from it.
fn source(config: &ServerConfig, about: &About, files: &mut Files) -> Source {
    match about.record.source {
        SourceRecord::Nothing => Source::Nothing,
        SourceRecord::Fill(byte) => Source::Fill(byte),
        SourceRecord::Server { offset, identity, .. } => {
            let (address, region) = about.path.split_once('\n').unwrap_or((&about.path, ""));
            let key = (about.path.clone(), offset, identity);
            let Files { by_range, open } = files;
            let file = by_range.entry(key).or_insert_with(|| {
                let neighbours = config.neighbours.clone();
                open.add(BackingFile::distant(neighbours, address, region, offset, identity))
            });
            Source::File(Arc::clone(file))
        }
        SourceRecord::File { offset, identity, .. } => {
            let bytes = PageCount::new(about.record.pages).bytes().get();
            let range = (about.path.as_str(), offset, identity);
            Source::File(reopen(config, &about.name, range, bytes, files))
        }
    }
}

/// A range of a file, opened again: path, offset, and which file it was.
fn reopen(
    config: &ServerConfig,
    name: &str,
    (path, offset, identity): (&str, u64, FileIdentity),
    bytes: u64,
    files: &mut Files,
) -> Arc<BackingFile> {
    let key = (path.to_owned(), offset, identity);
    if let Some(file) = files.by_range.get(&key) {
        return Arc::clone(file);
    }
    let missing = |message: fmt::Arguments<'_>| {
        config.log.line(&LogLine::new(LogLevel::Error, "file_refused", message));
        BackingFile::missing(path, offset, identity)
    };
    let file = match BackingFile::open(&config.directories, path, offset, bytes) {
        Ok(file) if is_it(identity, file.identity()) => file,
        // Pages of both would be mixed.
        Ok(_) => missing(format_args!(
            "{path} is another file than the one that region {name} is made from; what is not in \
             memory of it is refused: put the former file back under that name and start the \
             server again, or delete the region"
        )),
        Err(error) => missing(format_args!(
            "cannot open {path} again, of which region {name} is made: {error}; what is not \
             in memory of it is refused"
        )),
    };
    let file = files.open.add(file);
    files.by_range.insert(key, Arc::clone(&file));
    file
}

/// Shows each leaf of some tables once, though tables share leaves.
fn each_leaf<'a>(
    tables: impl Iterator<Item = &'a table::Table>,
    mut show: impl FnMut(&table::Leaf),
) {
    let mut seen = HashSet::new();
    for table in tables {
        let mut from = PageIndex::new(0);
        while let Some((first, leaf)) = table.leaf_from(from) {
            if seen.insert(std::ptr::from_ref(leaf)) {
                show(&table::lock(leaf));
            }
            from = PageIndex::new(first.get() + LEAF_PAGES as u64);
        }
    }
}

/// The journal could not be written anew after a hand-over that had failed.
#[derive(Debug)]
pub(crate) struct StaleJournal {
    not_written: io::Error,
    /// The one that the successor has left is there still.
    not_removed: Option<io::Error>,
}

impl fmt::Display for StaleJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write the journal anew: {}; ", self.not_written)?;
        match &self.not_removed {
            None => write!(f, "whoever serves after a kill begins with nothing"),
            Some(error) => write!(
                f,
                "nor remove the one that the successor has left: {error}; it is outdated: remove the directory for data \
                 before another server uses it"
            ),
        }
    }
}

impl Engine {
    /// Refuses if hardly anything more can be noted.
    pub(crate) fn check_journal(&self) -> Result<(), RefusalCode> {
        match self.tiers.journal() {
            Some(journal) if journal.is_short() => Err(RefusalCode::Busy),
            _ => Ok(()),
        }
    }

    /// Notes a session that nobody has seen yet.
    pub(super) fn note_new(&self, session: &Session) {
        self.note_all(session, None);
    }

    /// Notes a session that nobody has seen yet and that holds what another one does, which is locked.
    pub(super) fn note_copy(&self, original: &Session, copy: &Session) {
        // It has a new generation.
        self.note_session(original);
        self.note_all(copy, Some(original.region.id));
    }

    /// Notes a session with all that belongs to it. Until the last of it is noted it is one that ends with
    /// the process: never is a part of it there.
    fn note_all(&self, session: &Session, original: Option<RegionId>) {
        let Some(journal) = self.tiers.journal() else { return };
        with_record(session, |record| journal.note(&Record::Session(record.temporary())));
        self.note_blocks(&session.region, 0);
        let region = session.region.id;
        if let Some(from) = original {
            journal.note(&Record::Copy { to: region, from });
        } else {
            for (range, tier) in session.region.prefers.ranges() {
                journal.note(&Record::Prefer { region, range, tier: Some(tier) });
            }
        }
        if let Some(from) = session.region.parent() {
            journal.note(&Record::CopyOf { to: region, from });
        }
        self.note_session(session);
    }

    /// Notes what is said of a session.
    pub(super) fn note_session(&self, session: &Session) {
        if let Some(journal) = self.tiers.journal() {
            with_record(session, |record| journal.note(&Record::Session(record)));
        }
    }

    /// Notes a region's blocks from one on.
    pub(super) fn note_blocks(&self, region: &Region, from: usize) {
        for block in &region.blocks[from..] {
            self.tiers.note(|| Record::Block { region: region.id, block: block.get() });
        }
    }

    /// Whether another process can go on where this one is killed.
    pub(crate) const fn has_journal(&self) -> bool {
        self.tiers.journal().is_some()
    }

    /// Whether something could not be noted, so that nobody could go on where this process is killed.
    pub(crate) fn has_broken_journal(&self) -> bool {
        self.tiers.journal().is_some_and(Journal::is_broken)
    }

    /// Notes all sessions as versions of the journal do that know nothing of which file a region is made from.
    #[cfg(test)]
    pub(super) fn forget_which_files(&self) {
        let Some(journal) = self.tiers.journal() else { return };
        for shared in self.sessions().by_id.values() {
            with_record(&lock(shared), |record| {
                let source = match record.source {
                    SourceRecord::File { path, offset, .. } => {
                        SourceRecord::File { path, offset, identity: None }
                    }
                    other => other,
                };
                journal.note(&Record::Session(SessionRecord { source, ..record }));
            });
        }
    }

    #[cfg(test)]
    pub(crate) fn give_journal_up(&self) {
        self.tiers.journal().unwrap().give_up().unwrap();
    }

    /// Whether hardly anything more can be noted, though it was just looked for room.
    pub(crate) fn lacks_journal_room(&self) -> bool {
        let Some(journal) = self.tiers.journal().filter(|journal| journal.is_short()) else {
            return false;
        };
        journal.look_again();
        journal.is_short()
    }

    /// Whether the journal is worth being rewritten.
    pub(crate) fn has_long_journal(&self) -> bool {
        let least = self.config.limits.journal_bytes;
        self.tiers.journal().is_some_and(|journal| journal.is_long(least))
    }

    /// As [`Engine::rewrite_journal`], but makes nobody wait where there is no room for it anyhow.
    pub(crate) fn renew_journal(&self) -> io::Result<()> {
        let Some(journal) = self.tiers.journal() else {
            return Ok(());
        };
        let usage = self.tiers.usage();
        let in_dram = u64::from(self.arena.taken()).saturating_sub(usage.compressed_slots);
        // As far as that is known without a look at the tables.
        let pages = in_dram + usage.compressed_pages + usage.file_pages;
        if !journal.has_room_for(pages * journal::PUT_BYTES) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.rewrite_journal()
    }

    /// Rewrites the journal as what is known now. Everybody else waits, for some tens of
    /// nanoseconds for each page.
    pub(crate) fn rewrite_journal(&self) -> io::Result<()> {
        let Some(journal) = self.tiers.journal() else {
            return Ok(());
        };
        self.at_rest(|header, tell| journal.rewrite(&header, tell))
    }

    /// Does something while nothing changes, with the header of a journal and what writes it.
    fn at_rest<T>(&self, then: impl FnOnce(JournalHeader, &mut dyn FnMut(&mut Vec<u8>)) -> T) -> T {
        let sessions = self.sessions();
        // Nobody else ever waits for a second session while it holds one, so this ends.
        let all: Vec<_> = sessions.by_id.values().map(lock).collect();
        let (slots, next) = (self.arena.slots(), sessions.next);
        let header = header(slots, &self.arena.descriptor(), self.incarnation.get(), next);
        self.tiers.with_shelves(|shelves| {
            then(header, &mut |out| {
                shelves.iter().for_each(|shelf| shelf.encode(out));
                all.iter().for_each(|session| tell_session(session, out));
                let mut seen = HashMap::new();
                all.iter().for_each(|session| tell_pages(&session.region, &mut seen, out));
            })
        })
    }

    /// All that the tables say, to be handed over.
    pub(crate) fn told(&self, has_metrics: bool) -> (Given, Vec<u8>) {
        self.at_rest(|header, tell| {
            let given = Given {
                slots: header.slots,
                has_file: self.tiers.has_file(),
                has_data: self.has_journal(),
                has_metrics,
                incarnation: header.incarnation,
                next_session: header.next_session,
                memory: self.config.memory,
            };
            let mut records = Vec::new();
            tell(&mut records);
            (given, records)
        })
    }

    /// The file of the slowest tier.
    pub(crate) fn file_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.tiers.file_tier().map(FileTier::descriptor)
    }

    /// The lock of the directory for data.
    pub(crate) fn lock_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.tiers.journal().map(Journal::lock)
    }

    /// What this process notes counts from now on.
    pub(crate) fn put_journal(&self) -> Result<(), DataError> {
        self.tiers.journal().map_or(Ok(()), Journal::put)
    }

    /// Removes what a successor that is no more has left.
    pub(crate) fn clear_after(&self, process: u32) {
        if let Some(journal) = self.tiers.journal() {
            journal.remove_unfinished_of(process);
        }
    }

    /// Lets no backup or restore begin; false, and they may, if one is under way.
    pub(crate) fn close_jobs(&self) -> bool {
        self.jobs.close()
    }

    /// Begins anew after a hand-over that came to nothing. The successor may have put its journal in
    /// place.
    pub(crate) fn serve_again(&self) -> Result<(), StaleJournal> {
        self.keep_again();
        self.jobs.open();
        let Some(journal) = self.tiers.journal().filter(|journal| !journal.is_in_place()) else {
            return Ok(());
        };
        let Err(not_written) = self.rewrite_journal() else { return Ok(()) };
        Err(StaleJournal { not_written, not_removed: journal.give_up().err() })
    }

    /// Stops in order: the disk has all that is to be gone on with.
    pub(crate) fn settle(&self) -> io::Result<()> {
        let Some(journal) = self.tiers.journal() else {
            return Ok(());
        };
        if journal.is_broken() {
            // There may be room for it by now.
            self.rewrite_journal()?;
        }
        self.tiers.file_tier().map_or(Ok(()), FileTier::sync)?;
        self.sync_files();
        journal.stop(&self.arena)
    }
}

fn tell_session(session: &Session, out: &mut Vec<u8>) {
    with_record(session, |record| Record::Session(record).encode(out));
    let region = session.region.id;
    for block in &session.region.blocks {
        Record::Block { region, block: block.get() }.encode(out);
    }
    for range in session.region.pins.ranges() {
        Record::Pin { region, range }.encode(out);
    }
    for (range, tier) in session.region.prefers.ranges() {
        Record::Prefer { region, range, tier: Some(tier) }.encode(out);
    }
    if let Some(from) = session.region.parent() {
        Record::CopyOf { to: region, from }.encode(out);
    }
    for (page, begins) in session.region.working_set.records() {
        Record::Read { region, page, begins }.encode(out);
    }
}

/// The pages of a region. A leaf that was told for another region is only referred to.
fn tell_pages(
    region: &Region,
    seen: &mut HashMap<*const Mutex<table::Leaf>, RegionId>,
    out: &mut Vec<u8>,
) {
    let mut from = PageIndex::new(0);
    while let Some((first, leaf)) = region.table.leaf_from(from) {
        from = PageIndex::new(first.get() + LEAF_PAGES as u64);
        if let Some(other) = seen.get(&std::ptr::from_ref(leaf)) {
            Record::Share { to: region.id, from: *other, page: first }.encode(out);
            continue;
        }
        seen.insert(leaf, region.id);
        let leaf = table::lock(leaf);
        for (at, portion) in leaf.portions.iter() {
            let page = PageIndex::new(first.get() + at as u64);
            Record::Put(portion.record(region.id, page)).encode(out);
        }
    }
}

fn with_record(session: &Session, then: impl FnOnce(SessionRecord<'_>)) {
    let region = &session.region;
    let both;
    let source = match &region.source {
        Source::Nothing => SourceRecord::Nothing,
        Source::Fill(byte) => SourceRecord::Fill(*byte),
        Source::File(file) => {
            let offset = file.offset();
            if let Some(neighbour) = file.neighbour() {
                both = format!("{}\n{}", neighbour.address(), neighbour.region());
                SourceRecord::Server { path: &both, offset, identity: file.identity() }
            } else {
                // It came as text.
                let path = file.path().to_str().unwrap_or_default();
                SourceRecord::File { path, offset, identity: file.identity() }
            }
        }
    };
    let flags = [
        (session.dynamic, SessionRecord::DYNAMIC),
        (session.is_resident, SessionRecord::RESIDENT),
        (region.is_frozen, SessionRecord::FROZEN),
        (region.copies_on_access, SessionRecord::COPIES_ON_ACCESS),
        (region.writes_back, SessionRecord::WRITES_BACK),
        (session.is_temporary, SessionRecord::TEMPORARY),
        (region.has_own_range, SessionRecord::HAS_OWN_RANGE),
    ];
    let flags = flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum();
    then(SessionRecord {
        session: region.id,
        token: session.token,
        granted: session.granted.get(),
        epoch: region.epoch.get(),
        pages: region.pages.get(),
        page_bytes: region.page_bytes(),
        generation: region.generation,
        flags,
        source,
        name: &session.name,
        // It came as text.
        own: region.own.as_ref().map(|own| OwnRecord {
            path: own.file.path().to_str().unwrap_or_default(),
            offset: own.file.offset(),
            identity: own.file.identity(),
        }),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backing_file_is_known_by_its_birth_and_its_number() {
        let (then, later) = (1_000_000_007, 1_000_000_008);
        let file = Some((then, 5));
        for same in [file, Some((0, 5)), None] {
            assert!(is_it(file, same) && is_it(same, file), "{same:?}");
        }
        // One that was made later may have the number of one that is gone.
        for other in [Some((later, 5)), Some((then, 6)), Some((0, 6))] {
            assert!(!is_it(file, other) && !is_it(other, file), "{other:?}");
        }
    }
}
