//! What the server does: sessions, reservations and pages, without any input or output. Every
//! request is checked for session, token, epoch, incarnation and bounds before it is served.
//!
//! Workers share one engine. Locks are taken in the order hand, sessions, session, leaf, shelves,
//! arena, journal, and never two sessions at once but to rewrite the journal. None is held while a disk is waited for.

#[cfg(test)]
mod attached;
mod backup;
mod copies;
mod demote;
mod flush;
#[cfg(test)]
mod lasting;
mod map;
mod named;
mod own_range;
mod pages;
mod parts;
mod revive;
mod shape;
#[cfg(test)]
mod speed;
mod supply;
mod tier_file;
mod working_sets;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use farmem_region::{
    BlockId, ByteCount, Epoch, Incarnation, Nanos, PAGE_SIZE, PageCount, PageIndex, RegionId,
    SessionId,
};
use farmem_vmem::Arena;
use farmem_wire::{
    Action, Attach, AttachMode, BodyError, FullBody, GrantedSetup, Header, Hello, HelloReply,
    Malloc, MallocReply, PageEntry, ProtocolVersion, RefusalCode, ServerStat, Setup,
};

use crate::backing::OpenFiles;
use crate::config::ServerConfig;
use crate::counters::{Counters, count};
use crate::engine::copies::Taken;
use crate::engine::demote::Keeper;
pub(crate) use crate::engine::named::Bring;
use crate::engine::revive::Revived;
use crate::handover::Handed;
use crate::headroom::Headroom;
use crate::journal::Record;
use crate::leases::Leases;
use crate::log::{LogLevel, LogLine, RateLimitedLog};
use crate::region::{Region, block_pages};
use crate::server::ServerError;
use crate::session::{ConnectionId, Reservation, Session, Traffic};
use crate::tiers::Tiers;

/// State of the server, shared by its workers.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) config: ServerConfig,
    pub(crate) arena: Arc<Arena>,
    headroom: Headroom,
    tiers: Tiers,
    keeper: Keeper,
    /// About tiers and files.
    log: RateLimitedLog,
    /// About what clients ask for: by itself, so that no client can keep the other lines out.
    mistakes: RateLimitedLog,
    pub(crate) counters: Counters,
    incarnation: Incarnation,
    reservation: Reservation,
    sessions: Mutex<Sessions>,
    /// Sessions without a connection: while there are none, nobody looks for them.
    orphans: AtomicU64,
    /// Pages stored in all regions; one that copies share counts for each.
    pages: AtomicU64,
    /// Pages that are pinned.
    pinned: AtomicU64,
    /// Whether slots were freed since someone looked: there may be memory to give back.
    surplus: AtomicBool,
    next_connection: AtomicU64,
    jobs: backup::Jobs,
    /// What regions are made from.
    files: OpenFiles,
}

#[derive(Debug)]
struct Sessions {
    by_id: BTreeMap<SessionId, SharedSession>,
    /// Of named regions.
    names: HashMap<String, SessionId>,
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
    /// Who has the range of a file.
    Taken(Taken),
    /// See [`Refusal::waits`].
    Waits,
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

    pub(crate) const fn taken(taken: Taken) -> Self {
        Self { code: RefusalCode::RangeTaken, detail: Detail::Taken(taken) }
    }

    /// Nothing has happened: the request is to be repeated by a caller that may wait.
    pub(crate) const fn waits() -> Self {
        Self { code: RefusalCode::Busy, detail: Detail::Waits }
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
    /// A client of a named region said so; not while others believe what they know of it.
    Deleted(ConnectionId),
}

/// What a connection knows of itself.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) connection: ConnectionId,
    pub(crate) session: Option<(SessionId, SharedSession)>,
    /// The session's.
    pub(crate) traffic: Arc<Traffic>,
    /// Whether it may be made to wait for disks, and for memory. Where many callers are served by
    /// one thread it may not: see [`Refusal::waits`].
    pub(crate) may_wait: bool,
    /// Whether it was given the arena's file.
    pub(crate) shares_arena: bool,
    /// Whether it was given a lease on its region's map.
    pub(crate) holds_lease: bool,
    /// Whether it is told what others change.
    pub(crate) listens: bool,
}

impl Caller {
    /// Whether its session is a named region's, which clients share that know nothing of each other.
    pub(crate) fn is_one_of_many(&self) -> bool {
        self.session.as_ref().is_some_and(|(_, session)| lock(session).is_resident)
    }
}

impl Engine {
    /// A server's state, with what a former process has left of it.
    pub(crate) fn new(config: ServerConfig) -> Result<Self, ServerError> {
        let revived = revive::revive(&config)?;
        Ok(Self::over(config, revived))
    }

    /// What a running server has handed over. Its journal does not count before
    /// [`Engine::put_journal`].
    pub(crate) fn take_over(
        config: ServerConfig,
        handed: &mut Handed,
    ) -> Result<Self, ServerError> {
        let revived = revive::take_over(&config, handed)?;
        Ok(Self::over(config, revived))
    }

    fn over(config: ServerConfig, revived: Revived) -> Self {
        let Revived { tiers, incarnation, sessions, tally, files, unidentified, .. } = revived;
        let reservation = Reservation::new(config.promise().max(tally.granted));
        reservation.restore(tally.granted);
        let engine = Self {
            arena: Arc::clone(&tiers.arena),
            headroom: Headroom::new(config.memory_left.clone()),
            tiers,
            keeper: Keeper::default(),
            log: RateLimitedLog::new(config.log.clone()),
            mistakes: RateLimitedLog::new(config.log.clone()),
            counters: Counters::default(),
            incarnation,
            reservation,
            sessions: Mutex::new(sessions),
            orphans: AtomicU64::new(tally.orphans),
            pages: AtomicU64::new(tally.pages),
            pinned: AtomicU64::new(tally.pinned),
            surplus: AtomicBool::new(true),
            next_connection: AtomicU64::new(tally.next_connection),
            jobs: backup::Jobs::default(),
            files,
            config,
        };
        for session in unidentified.into_iter().filter_map(|id| engine.session(id).ok()) {
            engine.note_session(&lock(&session));
        }
        engine
    }

    /// A caller that is attached to nothing.
    pub(crate) fn caller(&self) -> Caller {
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let (connection, traffic) = (ConnectionId(id), Arc::default());
        Caller {
            connection,
            session: None,
            traffic,
            may_wait: false,
            shares_arena: false,
            holds_lease: false,
            listens: false,
        }
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
            lasts: self.tiers.journal().is_some(),
            clones_have_ranges: true,
            session_timeout_ms: u32::try_from(timeout).unwrap_or(u32::MAX),
            connection: caller.connection.0,
            actions: (1..64).filter(|n| Action::from_number(*n).is_served()).map(|n| 1 << n).sum(),
            arena_slots: u64::from(self.arena.slots()),
        })
    }

    /// Starts a session and attaches the caller to it. Its region is empty, or, if the header names
    /// another session and proves the right to use it, a virtual copy of that one's.
    pub(crate) fn setup(
        &self,
        caller: &mut Caller,
        header: &Header,
        setup: &Setup<'_>,
    ) -> Result<(Header, GrantedSetup), Refusal> {
        if caller.session.is_some() {
            return Err(RefusalCode::Malformed.into());
        }
        let original = if header.session == SessionId::default() {
            None
        } else {
            self.check_incarnation(header)?;
            Some(self.session(header.session)?)
        };
        let mut sessions = self.sessions();
        // No region grows meanwhile: that takes the lock of the sessions too.
        let inherited = original.as_ref().map(|original| {
            let original = lock(original);
            // Before anything is said of what there is room for.
            check_original(&original, header).map(|()| original.region.pages.bytes())
        });
        let inherited = inherited.transpose()?;
        let amount = setup.amount.max(inherited.unwrap_or_default());
        let (id, mut session) =
            self.session_for(&mut sessions, setup.name, amount, setup.accept_partial)?;
        let is_copy = original.is_some();
        if let Some(original) = original
            && let Err(refusal) = self.inherit(&mut sessions, &mut session, header, &original)
        {
            self.reservation.release(session.granted);
            session.region.blocks.drain(..).for_each(|block| sessions.blocks.give_back(block));
            return Err(refusal);
        }
        session.dynamic = setup.dynamic;
        session.attach(caller.connection);
        caller.traffic = Arc::clone(&session.traffic);
        let reply = self.describe(&session);
        if is_copy {
            self.note_session(&session);
        } else {
            self.note_new(&session);
        }
        let shared = Arc::new(Mutex::new(session));
        sessions.by_id.insert(id, Arc::clone(&shared));
        caller.session = Some((id, shared));
        Ok(reply)
    }

    /// Makes the region of a new session a virtual copy of another session's: neither time nor memory
    /// depend on its size.
    fn inherit(
        &self,
        sessions: &mut Sessions,
        session: &mut Session,
        header: &Header,
        original: &SharedSession,
    ) -> Result<(), Refusal> {
        let mut original = lock(original);
        check_original(&original, header)?;
        let pages = original.region.pages;
        if pages.bytes() > session.granted {
            let asked = pages.bytes();
            return Err(Refusal::full(FullBody { asked, free: session.granted }));
        }
        self.add_blocks(sessions, &mut session.region, pages)?;
        session.region.pages = pages;
        session.region.begin_as_copy(&mut original.region);
        self.note_copy(&original, session);
        self.keep_pinned_apart(&mut original.region);
        self.pages.fetch_add(original.region.table.stored().get(), Ordering::Relaxed);
        Ok(())
    }

    /// A session that nobody is attached to, not yet listed, with its memory reserved.
    fn session_for(
        &self,
        sessions: &mut Sessions,
        name: &str,
        amount: ByteCount,
        accept_partial: bool,
    ) -> Result<(SessionId, Session), Refusal> {
        self.check_journal()?;
        let token = random().map_err(|_| RefusalCode::Busy)?;
        if sessions.by_id.len() >= self.config.limits.sessions_max {
            return Err(RefusalCode::Busy.into());
        }
        let granted = self.reservation.reserve(amount, accept_partial)?;
        let id = SessionId::new(sessions.next);
        sessions.next += 1;
        let session = Session {
            id,
            token,
            name: name.to_owned(),
            granted,
            dynamic: false,
            region: Region::new(RegionId::new(id.get())),
            is_resident: false,
            is_temporary: false,
            traffic: Arc::default(),
            attached: Vec::new(),
            leases: Leases::default(),
            orphaned_since: None,
            assigned: HashMap::new(),
            ended: false,
        };
        Ok((id, session))
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
        if attach.mode == AttachMode::Join {
            session.check_epoch(header)?;
        }
        self.bind(caller, &mut session, attach)?;
        caller.traffic = Arc::clone(&session.traffic);
        let reply = self.describe(&session);
        drop(session);
        caller.session = Some((header.session, shared));
        Ok(reply)
    }

    /// Binds the caller's connection to a session.
    fn bind(&self, caller: &Caller, session: &mut Session, attach: &Attach) -> Result<(), Refusal> {
        let former = ConnectionId(attach.replaces);
        if session.current(former) >= self.config.limits.connections_per_session_max {
            // Before anybody is shut out.
            return Err(RefusalCode::Busy.into());
        }
        session.attached.retain(|(attached, _)| *attached != former);
        session.end_news(former);
        if attach.mode == AttachMode::TakeOver {
            let epoch = session.region.epoch.get() + 1;
            session.region.epoch = Epoch::new(epoch);
            session.region.working_set.begin_spell();
        }
        session.attach(caller.connection);
        session.leases.replace(former, caller.connection);
        if attach.mode == AttachMode::TakeOver {
            session.leases.take_over(caller.connection);
            self.note_session(session);
        }
        if session.orphaned_since.take().is_some() {
            self.orphans.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What setup, attach and open answer.
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
        session.check_change(header)?;
        if session.is_resident {
            // Its size is part of what it is.
            return Err(RefusalCode::Malformed.into());
        }
        let had = session.region.pages;
        let wanted = malloc.from.get().checked_add(malloc.add.get());
        let wanted = PageCount::new(wanted.ok_or(RefusalCode::Malformed)?);
        if malloc.from > had {
            return Err(RefusalCode::Malformed.into());
        }
        if wanted > had {
            self.check_journal()?;
            self.cover(&mut session, wanted)?;
            let blocks = session.region.blocks.len();
            let added = self.add_blocks(&mut sessions, &mut session.region, wanted);
            if added.is_ok() {
                session.region.pages = wanted;
            }
            // In this order: a region never has less of them than it needs.
            self.note_blocks(&session.region, blocks);
            self.note_session(&session);
            added?;
        }
        Ok(MallocReply {
            address: session.region.address(PageIndex::new(malloc.from.get()), &self.config),
            pages: session.region.pages,
            granted: session.granted,
        })
    }

    /// Gives a region the blocks that so many pages need.
    fn add_blocks(
        &self,
        sessions: &mut Sessions,
        region: &mut Region,
        pages: PageCount,
    ) -> Result<(), Refusal> {
        let blocks = pages.get().div_ceil(block_pages(&self.config));
        while (region.blocks.len() as u64) < blocks {
            let block = sessions.blocks.take(self.config.widths.blocks());
            region.blocks.push(block.ok_or(RefusalCode::Busy)?);
        }
        Ok(())
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

    /// Ends a session; the caller need not be attached to it, but must know its token and epoch.
    pub(crate) fn disconnect(&self, header: &Header) -> Result<(), Refusal> {
        self.check_incarnation(header)?;
        let shared = self.session(header.session)?;
        {
            let mut session = lock(&shared);
            if session.token != header.token {
                return Err(RefusalCode::WrongToken.into());
            }
            session.check_epoch(header)?;
            if let [(only, _)] = session.attached[..] {
                // It can only be that one's client, who believes nothing any more.
                session.leases.give_up(only);
            }
        }
        // A named region stays: only who was attached leaves, with its connection.
        self.end(&shared, Cause::Disconnected, |session| !session.is_resident);
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
        if let Cause::Deleted(by) = cause
            && session.leases.check_end(Some(by), Instant::now()).is_err()
        {
            return false;
        }
        session.ended = true;
        // Before anything of it is free.
        self.tiers.note(|| Record::End(session.region.id));
        sessions.by_id.remove(&session.id);
        if session.is_resident {
            sessions.names.remove(&session.name);
        }
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
        named::end_region(self, &mut session.region);
        drop(session);
        match cause {
            Cause::Disconnected | Cause::Deleted(_) => self.arena.release(assigned.into_values()),
            // The client may be asleep in the middle of writing into them: they are never used
            // again. At most a megabyte for each such session.
            Cause::TimedOut => drop(assigned),
        }
        self.pages.fetch_sub(stored, Ordering::Relaxed);
        table.clear(&self.tiers, |slots| self.arena.release(slots.drain(..)));
        self.forget_twins();
        self.surplus.store(true, Ordering::Relaxed);
        true
    }

    /// Logs what went wrong with a tier or a file.
    fn tell(&self, event: &'static str, message: std::fmt::Arguments<'_>) {
        self.log.line(&LogLine::new(LogLevel::Error, event, message));
    }

    /// Logs what a client was refused that it should know better.
    fn warn(&self, event: &'static str, message: std::fmt::Arguments<'_>) {
        self.mistakes.line(&LogLine::new(LogLevel::Warning, event, message));
    }

    /// Logs a refusal that only a client's mistake explains. Others are part of the game, or are told
    /// where their cause is known; all are counted.
    pub(crate) fn tell_mistake(
        &self,
        peer: impl FnOnce() -> String,
        caller: &Caller,
        action: Action,
        code: RefusalCode,
    ) {
        if !is_mistake(code) {
            return;
        }
        let (peer, action) = (peer(), action.name());
        let name = caller.session.as_ref().map(|(_, session)| lock(session).name.clone());
        let region = name.map_or_else(String::new, |name| format!(" in {name}"));
        let why = code.text();
        let message = format_args!("refused {action}{region} to a client ({peer}): {why}");
        let line = LogLine::new(LogLevel::Warning, "request_refused", message);
        let line = line.with("action", action).with("code", code.name()).with("peer", peer);
        self.mistakes.line(&line);
    }

    /// How the server is.
    pub(crate) fn stat(&self) -> ServerStat {
        let pages = self.pages.load(Ordering::Relaxed);
        let (sessions, regions) = {
            let sessions = self.sessions();
            (sessions.by_id.len() as u64, sessions.names.len() as u64)
        };
        let usage = self.tiers.usage();
        let page = PAGE_SIZE as u64;
        let mut stat = ServerStat {
            memory_bytes: self.config.memory.get(),
            reserved_bytes: self.reservation.reserved().get(),
            used_bytes: PageCount::new(pages).bytes().get(),
            sessions: sessions - regions,
            orphaned_sessions: self.orphans.load(Ordering::Relaxed),
            pages,
            slots: u64::from(self.arena.taken()),
            promise_bytes: self.reservation.capacity().get(),
            regions,
            pinned_pages: self.pinned.load(Ordering::Relaxed),
            compressed_pages: usage.compressed_pages,
            compressed_bytes: usage.compressed_slots * page,
            file_bytes: usage.file_pages * page,
            table_bytes: self.tiers.table_bytes(),
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

/// Whether a client that follows the protocol and knows its region is never refused so.
const fn is_mistake(code: RefusalCode) -> bool {
    matches!(
        code,
        RefusalCode::Unsupported
            | RefusalCode::HelloFirst
            | RefusalCode::Malformed
            | RefusalCode::WrongToken
            | RefusalCode::OutOfBounds
            | RefusalCode::Frozen
            | RefusalCode::NoTier
    )
}

/// Whether a request may begin a session as a copy of this one.
fn check_original(original: &Session, header: &Header) -> Result<(), RefusalCode> {
    if original.ended {
        return Err(RefusalCode::NoSession);
    }
    if original.token != header.token {
        return Err(RefusalCode::WrongToken);
    }
    original.check_epoch(header)?;
    if original.is_resident {
        // Those are copied under a name of their own.
        return Err(RefusalCode::Malformed);
    }
    Ok(())
}

/// Numbers that nobody can guess.
fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}
