//! What the server does: sessions, reservations and pages, without any input or output. Every
//! request is checked for session, token, epoch, incarnation and bounds before it is served.
//!
//! Workers share one engine. Locks are taken in the order sessions, session, arena; the lock of
//! a session is held for table work only, never while bytes move or checksums are computed.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farmem_region::{
    BlockId, ByteCount, Checksum, Epoch, Incarnation, Nanos, PAGE_SIZE, PageCount, PageIndex,
    RegionId, SessionId, Version,
};
use farmem_vmem::{Arena, Slot};
use farmem_wire::{
    Action, Attach, AttachMode, BodyError, FullBody, GrantedSetup, Header, Hello, HelloReply,
    Malloc, MallocReply, PageEntry, ProtocolVersion, RangeEntry, RefusalCode, SLOTS_ASSIGNED_MAX,
    ServerStat, Setup, page_checksum,
};

use crate::config::ServerConfig;
use crate::counters::{Counters, count};
use crate::session::{ConnectionId, Region, Reservation, Session, block_pages};
use crate::table::{Portion, Table};

/// State of the server, shared by its workers.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) config: ServerConfig,
    pub(crate) arena: Arena,
    pub(crate) counters: Counters,
    incarnation: Incarnation,
    reservation: Reservation,
    sessions: Mutex<Sessions>,
    /// Sessions without a connection: while there are none, nobody looks for them.
    orphans: AtomicU64,
    pages: AtomicU64,
    /// Whether slots were freed since someone looked: there may be memory to give back.
    surplus: AtomicBool,
    next_connection: AtomicU64,
}

#[derive(Debug)]
struct Sessions {
    by_id: HashMap<SessionId, SharedSession>,
    next: u64,
    blocks: BlockIds,
}

/// A session, as the connections that are attached to it hold it.
pub(crate) type SharedSession = Arc<Mutex<Session>>;

/// Why a request is refused, with what the client may want to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: RefusalCode,
    pub(crate) detail: Detail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    None,
    /// The page that is at fault.
    Page(PageEntry),
    Full(FullBody),
}

impl From<RefusalCode> for Refusal {
    fn from(code: RefusalCode) -> Self {
        Self { code, detail: Detail::None }
    }
}

impl From<BodyError> for Refusal {
    fn from(_: BodyError) -> Self {
        RefusalCode::Malformed.into()
    }
}

impl Refusal {
    pub(crate) const fn full(body: FullBody) -> Self {
        Self { code: RefusalCode::Full, detail: Detail::Full(body) }
    }

    const fn page(code: RefusalCode, entry: PageEntry) -> Self {
        Self { code, detail: Detail::Page(entry) }
    }
}

/// Why a session ends.
#[derive(Debug, Clone, Copy)]
enum Cause {
    /// Its client, or who is sure that the client is dead, said so.
    Disconnected,
    TimedOut,
}

/// How a page that is to be written stands to what is stored.
enum Standing {
    New,
    /// It is stored already: the write is repeated.
    Stored(PageEntry),
    /// Something newer is stored.
    Old(PageEntry),
}

/// What a connection knows of itself.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) connection: ConnectionId,
    pub(crate) session: Option<(SessionId, SharedSession)>,
    /// Whether it was given the arena's file.
    pub(crate) shares_arena: bool,
}

impl Engine {
    pub(crate) fn new(config: ServerConfig) -> io::Result<Self> {
        let beyond = config.limits.inflight_bytes.pages_rounded_up().get();
        let slots = config.memory.get() / PAGE_SIZE as u64 + beyond;
        let slots = u32::try_from(slots).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "a server lends at most 16 TiB")
        })?;
        Ok(Self {
            arena: Arena::new(slots)?,
            counters: Counters::default(),
            incarnation: Incarnation::new(random()?),
            reservation: Reservation::new(config.memory),
            sessions: Mutex::new(Sessions {
                by_id: HashMap::new(),
                next: 1,
                blocks: BlockIds::default(),
            }),
            orphans: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            surplus: AtomicBool::new(false),
            next_connection: AtomicU64::new(1),
            config,
        })
    }

    /// A caller that is attached to nothing.
    pub(crate) fn caller(&self) -> Caller {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        Caller { connection: ConnectionId(id), session: None, shares_arena: false }
    }

    pub(crate) const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The reply to hello, or `None` if there is no version in common.
    pub(crate) fn hello(
        &self,
        caller: &mut Caller,
        hello: &Hello,
        local: bool,
    ) -> Option<HelloReply> {
        let version = ProtocolVersion::V1.number();
        if hello.oldest > version || hello.newest < version {
            return None;
        }
        let timeout = self.config.limits.session_timeout.as_millis();
        caller.shares_arena = self.config.share_arena && hello.share_arena && local;
        Some(HelloReply {
            version,
            arena_shared: caller.shares_arena,
            session_timeout_ms: u32::try_from(timeout).unwrap_or(u32::MAX),
            connection: caller.connection.0,
            actions: (1..64).filter(|n| Action::from_number(*n).is_served()).map(|n| 1 << n).sum(),
            arena_slots: u64::from(self.arena.slots()),
        })
    }

    /// Starts a session and attaches the caller to it.
    pub(crate) fn setup(
        &self,
        caller: &mut Caller,
        setup: &Setup<'_>,
    ) -> Result<(Header, GrantedSetup), Refusal> {
        if caller.session.is_some() {
            return Err(RefusalCode::Malformed.into());
        }
        let token = random().map_err(|_| RefusalCode::Busy)?;
        let mut sessions = self.sessions();
        if sessions.by_id.len() >= self.config.limits.sessions_max {
            return Err(RefusalCode::Busy.into());
        }
        let granted = self.reservation.reserve(setup.amount, setup.accept_partial)?;
        let id = sessions.next;
        sessions.next += 1;
        let session = Session {
            id: SessionId::new(id),
            token,
            name: setup.name.to_owned(),
            granted,
            dynamic: setup.dynamic,
            region: Region {
                id: RegionId::new(id),
                epoch: Epoch::new(1),
                pages: PageCount::new(0),
                blocks: Vec::new(),
                table: Table::default(),
            },
            attached: vec![caller.connection],
            orphaned_since: None,
            assigned: HashMap::new(),
            ended: false,
        };
        let reply = self.describe(&session);
        let shared = Arc::new(Mutex::new(session));
        sessions.by_id.insert(SessionId::new(id), Arc::clone(&shared));
        caller.session = Some((SessionId::new(id), shared));
        Ok(reply)
    }

    /// Attaches the caller to a session that exists.
    pub(crate) fn attach(
        &self,
        caller: &mut Caller,
        header: &Header,
        attach: &Attach,
    ) -> Result<(Header, GrantedSetup), Refusal> {
        self.check_incarnation(header)?;
        if caller.session.is_some() {
            return Err(RefusalCode::Malformed.into());
        }
        let shared = self.session(header.session)?;
        let mut session = lock(&shared);
        if session.ended {
            return Err(RefusalCode::NoSession.into());
        }
        if session.token != header.token {
            return Err(RefusalCode::WrongToken.into());
        }
        match attach.mode {
            AttachMode::Join => session.check_epoch(header)?,
            AttachMode::TakeOver => {
                let epoch = session.region.epoch.get() + 1;
                session.region.epoch = Epoch::new(epoch);
            }
        }
        session.attached.retain(|attached| attached.0 != attach.replaces);
        if session.attached.len() >= self.config.limits.connections_per_session_max {
            return Err(RefusalCode::Busy.into());
        }
        session.attached.push(caller.connection);
        if session.orphaned_since.take().is_some() {
            self.orphans.fetch_sub(1, Ordering::Relaxed);
        }
        let reply = self.describe(&session);
        drop(session);
        caller.session = Some((header.session, shared));
        Ok(reply)
    }

    /// What setup and attach answer.
    fn describe(&self, session: &Session) -> (Header, GrantedSetup) {
        let mut header = Header::request(Action::Setup, 0);
        header.session = session.id;
        header.region = session.region.id;
        header.epoch = session.region.epoch;
        header.incarnation = self.incarnation;
        header.token = session.token;
        let granted = GrantedSetup {
            granted: session.granted,
            region: session.region.id,
            pages: session.region.pages,
        };
        (header, granted)
    }

    /// Makes the region larger.
    pub(crate) fn malloc(
        &self,
        caller: &Caller,
        header: &Header,
        malloc: &Malloc,
    ) -> Result<MallocReply, Refusal> {
        // Before the session's lock, as block ids are kept beside the sessions.
        let mut sessions = self.sessions();
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        let had = session.region.pages;
        let wanted = malloc.from.get().checked_add(malloc.add.get());
        let wanted = PageCount::new(wanted.ok_or(RefusalCode::Malformed)?);
        if malloc.from > had {
            return Err(RefusalCode::Malformed.into());
        }
        if wanted > had {
            self.cover(&mut session, wanted)?;
            let per_block = block_pages(&self.config);
            let blocks = usize::try_from(wanted.get().div_ceil(per_block)).unwrap_or(usize::MAX);
            while session.region.blocks.len() < blocks {
                let block = sessions.blocks.take(self.config.widths.blocks());
                session.region.blocks.push(block.ok_or(RefusalCode::Busy)?);
            }
            session.region.pages = wanted;
        }
        Ok(MallocReply {
            address: session.region.address(PageIndex::new(malloc.from.get()), &self.config),
            pages: session.region.pages,
            granted: session.granted,
        })
    }

    /// Makes sure that the session's grant covers `pages`.
    fn cover(&self, session: &mut Session, pages: PageCount) -> Result<(), Refusal> {
        let Some(missing) = pages.bytes().get().checked_sub(session.granted.get()) else {
            return Ok(());
        };
        if missing == 0 {
            return Ok(());
        }
        let missing = ByteCount::new(missing);
        if !session.dynamic {
            let used = session.region.pages.bytes().get();
            let free = ByteCount::new(session.granted.get().saturating_sub(used));
            let asked = ByteCount::new(pages.bytes().get() - used);
            return Err(Refusal::full(FullBody { asked, free }));
        }
        let added = self.reservation.reserve(missing, false)?;
        session.granted = ByteCount::new(session.granted.get() + added.get());
        Ok(())
    }

    /// Looks pages up: a token for each slot goes to `slots`, what is known of it to `found`.
    /// After a refusal both are as before.
    pub(crate) fn read(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: impl Iterator<Item = PageEntry>,
        slots: &mut Vec<Slot>,
        mut found: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let session = self.enter(caller, header)?;
        session.check_region(header)?;
        for entry in wanted {
            match find(&session.region, entry) {
                Ok(portion) => {
                    slots.push(self.arena.share(&portion.slot));
                    found(self.entry(entry.page, portion));
                }
                Err(refusal) => {
                    self.arena.release(slots.drain(..));
                    return Err(refusal);
                }
            }
        }
        drop(session);
        count(&self.counters.reads, 1);
        count(&self.counters.pages_read, slots.len());
        Ok(())
    }

    /// Checks a write before its pages arrive, and takes fresh slots for them.
    pub(crate) fn begin_write(
        &self,
        caller: &Caller,
        header: &Header,
        mut entries: impl Iterator<Item = PageEntry>,
        slots: &mut Vec<Slot>,
    ) -> Result<(), Refusal> {
        let session = self.enter(caller, header)?;
        session.check_region(header)?;
        if let Some(outside) = entries.find(|entry| !session.region.contains(entry.page)) {
            return Err(Refusal::page(RefusalCode::OutOfBounds, outside));
        }
        drop(session);
        if !self.arena.take(header.entries, slots) {
            return Err(RefusalCode::Busy.into());
        }
        Ok(())
    }

    /// Ends a write: the pages are in their slots. Either all of them match their checksums and
    /// those that are new are stored, or nothing changes. The slots are used up; `unused` is room
    /// for those that are not needed any more. Where the pages are now goes to `stored`.
    pub(crate) fn commit_write(
        &self,
        caller: &Caller,
        header: &Header,
        entries: &[PageEntry],
        slots: &mut Vec<Slot>,
        unused: &mut Vec<Slot>,
        stored: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let result = self
            .verify(header.region, entries, slots)
            .and_then(|()| self.flip(caller, header, entries, slots, unused, stored));
        self.arena.release(slots.drain(..).chain(unused.drain(..)));
        result
    }

    /// Recomputes the checksums from the stored bytes.
    fn verify(
        &self,
        region: RegionId,
        entries: &[PageEntry],
        slots: &[Slot],
    ) -> Result<(), Refusal> {
        for (entry, slot) in entries.iter().zip(slots) {
            let stored = page_checksum(region, entry.page, entry.version, self.arena.bytes(slot));
            if stored != entry.checksum {
                count(&self.counters.damaged_pages, 1);
                let found = PageEntry { checksum: stored, ..*entry };
                return Err(Refusal::page(RefusalCode::WrongChecksum, found));
            }
        }
        Ok(())
    }

    /// Puts verified pages into the table. A page whose version is stored already is left as it
    /// is, so a repeated write is harmless; an older version is refused after all other pages
    /// have been stored.
    fn flip(
        &self,
        caller: &Caller,
        header: &Header,
        entries: &[PageEntry],
        slots: &mut Vec<Slot>,
        unused: &mut Vec<Slot>,
        mut stored: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        let table = &mut session.region.table;
        let before = table.stored().get();
        let mut result = Ok(());
        for (entry, slot) in entries.iter().zip(slots.drain(..)) {
            match self.standing(table, entry) {
                Standing::New => {
                    let (version, checksum) = (entry.version, entry.checksum);
                    stored(PageEntry { slot: slot.number(), ..*entry });
                    unused.extend(table.put(entry.page, Portion { slot, version, checksum }));
                }
                Standing::Stored(there) => {
                    unused.push(slot);
                    stored(there);
                }
                Standing::Old(there) => {
                    unused.push(slot);
                    result = Err(Refusal::page(RefusalCode::OldVersion, there));
                }
            }
        }
        let added = table.stored().get() - before;
        drop(session);
        self.count_written(entries.len(), added);
        result
    }

    fn count_written(&self, pages: usize, added: u64) {
        self.pages.fetch_add(added, Ordering::Relaxed);
        count(&self.counters.writes, 1);
        count(&self.counters.pages_written, pages);
    }

    /// How a page that is to be written stands to what is stored.
    fn standing(&self, table: &Table, entry: &PageEntry) -> Standing {
        match table.get(entry.page) {
            Some(portion) if portion.version >= entry.version => {
                let there = self.entry(entry.page, portion);
                let is_same = there.version == entry.version && there.checksum == entry.checksum;
                if is_same { Standing::Stored(there) } else { Standing::Old(there) }
            }
            _ => Standing::New,
        }
    }

    /// Tops the session's slots up to `wanted` and lists all of them.
    pub(crate) fn assign_slots(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: usize,
        slots: &mut Vec<Slot>,
        mut list: impl FnMut(u32),
    ) -> Result<(), Refusal> {
        if !caller.shares_arena {
            return Err(RefusalCode::Unsupported.into());
        }
        let mut session = self.enter(caller, header)?;
        let missing = wanted.min(SLOTS_ASSIGNED_MAX).saturating_sub(session.assigned.len());
        self.assign(&mut session, missing, slots, |_| ());
        session.assigned.keys().for_each(|slot| list(*slot));
        Ok(())
    }

    /// Gives the session that many fresh slots, or none if the arena has not as many.
    fn assign(
        &self,
        session: &mut Session,
        count: usize,
        slots: &mut Vec<Slot>,
        mut list: impl FnMut(u32),
    ) {
        let count = u32::try_from(count).expect("at most SLOTS_ASSIGNED_MAX");
        if self.arena.take(count, slots) {
            for slot in slots.drain(..) {
                list(slot.number());
                session.assigned.insert(slot.number(), slot);
            }
        }
    }

    /// Stores pages that the client has written into slots of its session: either all that are
    /// new match their checksums and are stored, or nothing changes. The session gets as many
    /// fresh slots for those used up, which go to `list`.
    ///
    /// The session stays locked throughout: it has one writer, who waits for this.
    pub(crate) fn commit_slots(
        &self,
        caller: &Caller,
        header: &Header,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        slots: &mut Vec<Slot>,
        list: impl FnMut(u32),
    ) -> Result<(), Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        let session = &mut *session;
        let mut content = [0; PAGE_SIZE];
        for entry in entries.clone() {
            self.check_commit(session, &entry, &mut content)?;
        }
        let before = session.region.table.stored().get();
        let (mut used, mut result, pages) = (0, Ok(()), entries.len());
        for entry in entries {
            let table = &mut session.region.table;
            match self.standing(table, &entry) {
                Standing::Stored(_) => {}
                Standing::Old(there) => {
                    result = Err(Refusal::page(RefusalCode::OldVersion, there));
                }
                Standing::New => {
                    let Some(slot) = session.assigned.remove(&entry.slot) else {
                        // Named before for another page.
                        result = Err(Refusal::page(RefusalCode::NoSlot, entry));
                        continue;
                    };
                    let (version, checksum) = (entry.version, entry.checksum);
                    slots.extend(table.put(entry.page, Portion { slot, version, checksum }));
                    used += 1;
                }
            }
        }
        let added = session.region.table.stored().get() - before;
        self.count_written(pages, added);
        self.arena.release(slots.drain(..));
        self.assign(session, used, slots, list);
        result
    }

    /// Whether a page may be committed: it lies in the region and, unless it is stored already,
    /// in a slot of the session whose bytes match the checksum. They are copied to `content` to be
    /// looked at.
    fn check_commit(
        &self,
        session: &Session,
        entry: &PageEntry,
        content: &mut [u8; PAGE_SIZE],
    ) -> Result<(), Refusal> {
        if !session.region.contains(entry.page) {
            return Err(Refusal::page(RefusalCode::OutOfBounds, *entry));
        }
        if !matches!(self.standing(&session.region.table, entry), Standing::New) {
            return Ok(());
        }
        let Some(slot) = session.assigned.get(&entry.slot) else {
            return Err(Refusal::page(RefusalCode::NoSlot, *entry));
        };
        self.arena.copy_out(slot, content);
        let found = page_checksum(session.region.id, entry.page, entry.version, content);
        if found != entry.checksum {
            count(&self.counters.damaged_pages, 1);
            let found = PageEntry { checksum: found, ..*entry };
            return Err(Refusal::page(RefusalCode::WrongChecksum, found));
        }
        Ok(())
    }

    /// Forgets pages.
    pub(crate) fn free(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
        slots: &mut Vec<Slot>,
    ) -> Result<(), Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        if ranges.clone().any(|range| !session.region.contains_range(range.0)) {
            return Err(RefusalCode::OutOfBounds.into());
        }
        for range in ranges {
            session.region.table.remove(range.0, slots);
        }
        drop(session);
        self.pages.fetch_sub(slots.len() as u64, Ordering::Relaxed);
        self.arena.release(slots.drain(..));
        self.surplus.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a session; the caller need not be attached to it, but must know its token and epoch.
    pub(crate) fn disconnect(&self, header: &Header) -> Result<(), Refusal> {
        self.check_incarnation(header)?;
        let shared = self.session(header.session)?;
        {
            let session = lock(&shared);
            if session.token != header.token {
                return Err(RefusalCode::WrongToken.into());
            }
            session.check_epoch(header)?;
        }
        self.end(&shared, Cause::Disconnected, |_| true);
        Ok(())
    }

    /// A connection is gone.
    pub(crate) fn leave(&self, caller: &mut Caller, now: Nanos) {
        let Some((_, shared)) = caller.session.take() else {
            return;
        };
        let mut session = lock(&shared);
        let was_orphan = session.orphaned_since.is_some();
        session.detach(caller.connection, now);
        if !was_orphan && !session.ended && session.orphaned_since.is_some() {
            self.orphans.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether [`Engine::end_orphans`] may have something to do later.
    pub(crate) fn has_orphans(&self) -> bool {
        self.orphans.load(Ordering::Relaxed) > 0
    }

    /// Whether memory was freed that is not given back yet.
    pub(crate) fn has_surplus(&self) -> bool {
        self.surplus.load(Ordering::Relaxed)
    }

    /// Gives a chunk of free memory back to the system; returns whether there may be more.
    pub(crate) fn give_back(&self) -> io::Result<bool> {
        self.surplus.store(false, Ordering::Relaxed);
        self.arena.give_back_chunk()
    }

    /// Ends the sessions to which no connection came back in time, and hands each one's name and
    /// number of pages to `ended`.
    pub(crate) fn end_orphans(&self, now: Nanos, mut ended: impl FnMut(&str, u64)) {
        let timeout = self.config.limits.session_timeout.as_nanos();
        let is_over = |session: &Session| {
            let since = session.orphaned_since;
            since.is_some_and(|since| u128::from(now.since(since)) >= timeout)
        };
        let all = self.sessions();
        let over: Vec<_> =
            all.by_id.values().filter(|shared| is_over(&lock(shared))).cloned().collect();
        drop(all);
        for shared in over {
            let (name, pages) = {
                let session = lock(&shared);
                (session.name.clone(), session.region.table.stored().get())
            };
            // A connection may have come back since.
            if self.end(&shared, Cause::TimedOut, is_over) {
                count(&self.counters.sessions_timed_out, 1);
                ended(&name, pages);
            }
        }
    }

    /// Frees all that a session holds, if `still` says so. Returns whether it did.
    fn end(
        &self,
        shared: &SharedSession,
        cause: Cause,
        still: impl FnOnce(&Session) -> bool,
    ) -> bool {
        let mut sessions = self.sessions();
        let mut session = lock(shared);
        if session.ended || !still(&session) {
            return false;
        }
        session.ended = true;
        sessions.by_id.remove(&session.id);
        for block in session.region.blocks.drain(..) {
            sessions.blocks.give_back(block);
        }
        if session.orphaned_since.is_some() {
            self.orphans.fetch_sub(1, Ordering::Relaxed);
        }
        drop(sessions);
        self.reservation.release(session.granted);
        let stored = session.region.table.stored().get();
        let mut table = std::mem::take(&mut session.region.table);
        let assigned = std::mem::take(&mut session.assigned);
        drop(session);
        match cause {
            Cause::Disconnected => self.arena.release(assigned.into_values()),
            // The client may be asleep in the middle of writing into them: they are never used
            // again. At most a megabyte for each such session.
            Cause::TimedOut => drop(assigned),
        }
        self.pages.fetch_sub(stored, Ordering::Relaxed);
        table.clear(|slots| self.arena.release(slots.drain(..)));
        self.surplus.store(true, Ordering::Relaxed);
        true
    }

    /// How the server is.
    pub(crate) fn stat(&self) -> ServerStat {
        let pages = self.pages.load(Ordering::Relaxed);
        let mut stat = ServerStat {
            memory_bytes: self.reservation.capacity().get(),
            reserved_bytes: self.reservation.reserved().get(),
            used_bytes: PageCount::new(pages).bytes().get(),
            sessions: self.sessions().by_id.len() as u64,
            orphaned_sessions: self.orphans.load(Ordering::Relaxed),
            pages,
            slots: u64::from(self.arena.taken()),
            ..ServerStat::default()
        };
        self.counters.fill(&mut stat);
        stat
    }

    /// The caller's session, if the header may use it.
    fn enter<'a>(
        &self,
        caller: &'a Caller,
        header: &Header,
    ) -> Result<MutexGuard<'a, Session>, Refusal> {
        self.check_incarnation(header)?;
        match &caller.session {
            Some((id, shared)) if *id == header.session => {
                let session = lock(shared);
                session.check(caller.connection, header)?;
                Ok(session)
            }
            _ => Err(RefusalCode::NotAttached.into()),
        }
    }

    fn check_incarnation(&self, header: &Header) -> Result<(), RefusalCode> {
        if header.incarnation != self.incarnation {
            return Err(RefusalCode::WrongIncarnation);
        }
        Ok(())
    }

    fn session(&self, id: SessionId) -> Result<SharedSession, RefusalCode> {
        self.sessions().by_id.get(&id).cloned().ok_or(RefusalCode::NoSession)
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client is told of a page.
    fn entry(&self, page: PageIndex, portion: &Portion) -> PageEntry {
        let slot = if self.config.share_arena { portion.slot.number() } else { 0 };
        PageEntry { page, version: portion.version, checksum: portion.checksum, slot }
    }
}

/// The page that a read asks for. Version 0 asks for whichever there is.
fn find(region: &Region, wanted: PageEntry) -> Result<&Portion, Refusal> {
    if !region.contains(wanted.page) {
        return Err(Refusal::page(RefusalCode::OutOfBounds, wanted));
    }
    let Some(portion) = region.table.get(wanted.page) else {
        return Err(Refusal::page(RefusalCode::NoPage, wanted));
    };
    if wanted.version != Version::new(0) && wanted.version != portion.version {
        let (version, checksum) = (portion.version, Checksum::new(0));
        let stored = PageEntry { version, checksum, ..wanted };
        return Err(Refusal::page(RefusalCode::WrongVersionOfPage, stored));
    }
    Ok(portion)
}

/// Block ids: the smallest free one is given.
#[derive(Debug, Default)]
struct BlockIds {
    next: u32,
    free: BTreeSet<u32>,
}

impl BlockIds {
    fn take(&mut self, count: u64) -> Option<BlockId> {
        if let Some(id) = self.free.pop_first() {
            return Some(BlockId::new(id));
        }
        let id = self.next;
        self.next = id.checked_add(1).filter(|_| u64::from(id) < count)?;
        Some(BlockId::new(id))
    }

    fn give_back(&mut self, id: BlockId) {
        self.free.insert(id.get());
    }
}

fn lock(session: &SharedSession) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Numbers that nobody can guess.
fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}
