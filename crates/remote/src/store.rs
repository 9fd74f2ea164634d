//! [`RemoteStore`]: operations in, completions out, whatever happens to the connection.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use farmem_region::{
    Completion, ExternalAddress, Frames, Nanos, Outcome, PageCount, PageStore, Readiness, Request,
    StoreError, Ticket,
};
use farmem_transport::ArenaFile;
use farmem_wire::{
    Action, Advice, FullBody, GrantedSetup, Header, HelloReply, MAP_LEASE, Malloc, MallocReply,
    Open, RANGES_PER_MESSAGE_MAX, RefusalCode, Setup, Slots, page_checksum,
};

use crate::config::{RemoteConfig, SessionInfo, Timeouts};
use crate::exchange::{Exchange, ExchangeError};
use crate::link::{Arrived, Link, LinkError};
use crate::map::RegionMap;
use crate::messages::{
    MESSAGE_PAGES, MESSAGES_MAX, MessageIndex, Messages, Operation, OperationIndex, Operations,
    Wanted,
};
use crate::reconnect::{Reconnect, Step};
use crate::shared::{Kind, SharedArena};

/// A region grows by this much at a time, within what is reserved.
const EXTENT: PageCount = PageCount::new((64 << 20) / farmem_region::PAGE_SIZE as u64);
/// Pause before a request that was refused as busy is sent again.
const BUSY_PAUSE_US: u64 = 2_000;
/// Pause before a request that was refused because its source is away is sent again: the server asks the
/// other one no more often.
const SOURCE_PAUSE_US: u64 = 500_000;
/// How often a page that arrived damaged is asked for again, and a page that the server found
/// damaged sent again. Once is bad luck, more is a broken machine.
const DAMAGED_TRIES_MAX: u32 = 1;
/// Connections that may break one after the other with no reply in between: a server that breaks
/// the protocol is not asked for ever.
const FRUITLESS_LINKS_MAX: u32 = 3;
/// What a server's silence is borne for grows up to this.
const SILENCE_US_MAX: u64 = 8_000_000;

/// Keeps the pages of one region on one memory server.
#[derive(Debug)]
pub struct RemoteStore {
    config: RemoteConfig,
    session: SessionInfo,
    state: State,
    /// The server's name for the connection, for the next one to replace it.
    connection: u64,
    messages: Messages,
    operations: Operations,
    /// The memory of a server on this machine that lets us.
    arena: Option<SharedArena>,
    /// Connections that broke since the last reply.
    fruitless: u32,
    /// Where the region begins on the server, once it has pages.
    base: Option<ExternalAddress>,
    lease: MapLease,
}

/// Whether what the client knows of a named region is still so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MapLease {
    /// Nobody else can find it.
    NoName,
    /// Replies do not say so any more.
    Lost,
    /// They may.
    Lapsed,
    /// One has, to a request that was sent then.
    Since(Nanos),
}

#[derive(Debug)]
enum State {
    Up(Link),
    /// The connection broke; another one is being made.
    Down(Reconnect),
    /// Closed for good.
    Failed(StoreError),
}

/// After which pause, and for how long in all, a request that was refused so is sent again.
const fn put_off(code: RefusalCode, action: Action, timeouts: &Timeouts) -> (u64, u64) {
    match (code, action) {
        (RefusalCode::Busy, Action::Free) => (BUSY_PAUSE_US, timeouts.busy_free_us),
        (RefusalCode::Busy, _) => (BUSY_PAUSE_US, timeouts.busy_us),
        (RefusalCode::SourceAway, _) => (SOURCE_PAUSE_US, timeouts.reconnect_us),
        _ => (0, 0),
    }
}

impl RemoteStore {
    /// Connects, reserves memory and starts a region. Waits, at most for the named time-out.
    ///
    /// # Errors
    /// [`StoreError::Full`] if the server has no room, [`StoreError::Refused`] if it cannot be
    /// reached or refuses for another reason.
    pub fn connect(config: RemoteConfig, now: Nanos) -> Result<(Self, SessionInfo), StoreError> {
        let deadline = Instant::now() + Duration::from_micros(config.timeouts.connect_us);
        let begin = || {
            let share = config.share_arena;
            let (mut exchange, _, hello) = Exchange::open(&config.server, share, deadline)?;
            let setup = Setup {
                amount: config.amount,
                accept_partial: config.accept_partial,
                dynamic: config.dynamic,
                name: &config.name,
                credentials: &[],
            };
            let mut header = Header::request(Action::Setup, 2);
            if let Some(original) = &config.copy_of {
                header.session = original.session;
                header.token = original.token;
                header.epoch = original.epoch;
                header.incarnation = original.incarnation;
            }
            exchange.ask(header, |out| setup.encode(out));
            let reply = exchange.wait(deadline)?;
            let body = GrantedSetup::decode(exchange.bytes(reply.body))
                .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
            Ok((exchange, hello, reply.header, body))
        };
        let (exchange, hello, header, body) =
            begin().map_err(|error: ExchangeError| error.into_store_error(&config.server))?;
        Ok(Self::attached(config, exchange, &hello, &header, &body, now))
    }

    /// Attaches to a named region, as its only writer: whoever wrote before is refused from then on.
    /// Tells also what the region holds: takes as long as that needs, and waits for the server for the named
    /// time-out at most. Of the configuration the amount does not matter.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if there is no such region, or the server cannot be reached.
    pub fn open(
        config: RemoteConfig,
        name: &str,
        now: Nanos,
    ) -> Result<(Self, SessionInfo, RegionMap), StoreError> {
        let patience = Duration::from_micros(config.timeouts.connect_us);
        let deadline = Instant::now() + patience;
        let begin = || {
            let share = config.share_arena;
            let (mut exchange, _, hello) = Exchange::open(&config.server, share, deadline)?;
            let open = Open { take_over: true, name };
            exchange.ask(Header::request(Action::Open, 2), |out| open.encode(out));
            let reply = exchange.wait(deadline)?;
            let body = GrantedSetup::decode(exchange.bytes(reply.body))
                .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
            exchange.accept_pages();
            let map =
                RegionMap::download(&mut exchange, &reply.header, body.pages, patience, false)?;
            Ok((exchange, hello, reply.header, body, map))
        };
        let (exchange, hello, header, body, map) =
            begin().map_err(|error: ExchangeError| error.into_store_error(&config.server))?;
        let attached = Self::attached(config, exchange, &hello, &header, &body, now);
        let (mut store, session) = attached;
        store.base = Some(map.address);
        store.lease = if map.leased { MapLease::Lapsed } else { MapLease::Lost };
        store.messages.frees_come_late = true;
        Ok((store, session, map))
    }

    fn attached(
        mut config: RemoteConfig,
        mut exchange: Exchange,
        hello: &HelloReply,
        header: &Header,
        body: &GrantedSetup,
        now: Nanos,
    ) -> (Self, SessionInfo) {
        let session = SessionInfo {
            server: config.server.clone(),
            session: header.session,
            token: header.token,
            epoch: header.epoch,
            incarnation: header.incarnation,
            region: body.region,
            granted: body.granted,
            pages: body.pages,
        };
        if hello.lasts {
            // Where nobody listens for a while, another process may be about to go on.
            config.timeouts.refused_us = config.timeouts.reconnect_us;
        }
        // A file that cannot be used is as good as none.
        let arena = exchange.passed.take().and_then(|file| ArenaFile::adopt(file).ok());
        let mut store = Self {
            config,
            session: session.clone(),
            state: State::Up(Link::new(Box::new(exchange.into_socket()), now)),
            connection: hello.connection,
            messages: Messages::default(),
            operations: Operations::default(),
            arena: arena.map(SharedArena::new),
            fruitless: 0,
            base: None,
            lease: MapLease::NoName,
        };
        if let Some(arena) = &mut store.arena {
            store.messages.add_slots(&store.session);
            if store.config.copy_of.is_some() {
                arena.inherit(store.session.pages);
            }
        }
        (store, session)
    }

    /// The session, with the region's size as it is now.
    #[must_use]
    pub const fn session(&self) -> &SessionInfo {
        &self.session
    }

    /// Where the region's first block is, once the region has grown for the first time.
    #[must_use]
    pub const fn base(&self) -> Option<ExternalAddress> {
        self.base
    }

    /// Whether nobody else can have changed the region since the store was made: it has no name, or the
    /// server has said so, a little while ago at most.
    #[must_use]
    pub const fn is_own(&self, now: Nanos) -> bool {
        match self.lease {
            MapLease::NoName => true,
            MapLease::Since(sent) => now.since(sent) < MAP_LEASE.as_nanos() as u64,
            MapLease::Lost | MapLease::Lapsed => false,
        }
    }

    /// The descriptor that [`PageStore::readiness`] names.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.state {
            State::Failed(_) => None,
            State::Down(reconnect) => reconnect.descriptor(),
            State::Up(link) => Some(link.connection().descriptor()),
        }
    }

    /// Asks the server for an answer even if nothing else is asked: with the next `advance` calls
    /// a dead server is noticed.
    pub fn ping(&mut self) {
        if !self.messages.has_ping() {
            self.messages.add_ping(&self.session);
        }
    }

    /// Ends the session, which frees the region. Waits, at most for one attempt's time-out.
    ///
    /// # Errors
    /// [`StoreError::Refused`] if the server could not be told; it frees the region by itself
    /// when the session times out.
    pub fn disconnect(self) -> Result<(), StoreError> {
        let timeout = Duration::from_micros(self.config.timeouts.attempt_us);
        crate::admin::disconnect_session(&self.config.server, &self.session, timeout)
    }

    fn submit_pages(
        &mut self,
        ticket: Ticket,
        what: (Action, bool),
        pages: impl ExactSizeIterator<Item = (Wanted, farmem_region::FrameId)>,
    ) -> Result<(), StoreError> {
        let outcome = match what.0 {
            Action::Read => Outcome::Fetched { server_nanos: 0 },
            _ => Outcome::Stored,
        };
        let mut left = pages.len();
        let operation = self.begin(ticket, outcome, left.div_ceil(MESSAGE_PAGES))?;
        let mut pages = pages;
        while left > 0 {
            let count = left.min(MESSAGE_PAGES);
            let chunk = Chunk { pages: &mut pages, left: count };
            self.messages.add_pages(&self.session, what, operation, chunk);
            left -= count;
        }
        Ok(())
    }

    fn submit_grow(&mut self, ticket: Ticket, count: PageCount) -> Result<(), StoreError> {
        let had = self.session.pages.get();
        let reserved = self.session.granted.get() / farmem_region::PAGE_SIZE as u64;
        // Whole extents as long as they are reserved; beyond that no more than is needed.
        let extent = count.get().max(EXTENT.get()).min(reserved.saturating_sub(had));
        let add = PageCount::new(extent.max(count.get()));
        let outcome = Outcome::Grown { pages: self.session.pages };
        let operation = self.begin(ticket, outcome, 1)?;
        let malloc = Malloc { from: self.session.pages, add };
        self.messages.add_malloc(&self.session, operation, malloc);
        Ok(())
    }

    /// Begins an operation of that many messages, if there is room. One that is larger than the
    /// limit alone is let in when nothing else is there.
    fn begin(
        &mut self,
        ticket: Ticket,
        outcome: Outcome,
        messages: usize,
    ) -> Result<OperationIndex, StoreError> {
        if messages > self.messages.room() && self.messages.in_use() > 0 {
            return Err(StoreError::Busy { limit: MESSAGES_MAX });
        }
        // An operation on nothing still needs one answer to end with.
        let messages_left = messages.max(1);
        let operation = Operation { ticket, messages_left, outcome, error: None };
        let index = self.operations.add(operation);
        if messages == 0 {
            self.messages.add_free(&self.session, index, &[]);
        }
        Ok(index)
    }

    /// Moves bytes while the connection is up.
    fn advance_link(
        &mut self,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), Stop> {
        self.messages.take_up_delayed(now);
        let State::Up(link) = &mut self.state else {
            return Ok(());
        };
        link.look_again(&self.messages, now);
        link.send(&mut self.messages, self.arena.as_mut(), self.session.region, frames, now)?;
        while let State::Up(link) = &mut self.state
            && let Some(arrived) = link.receive(&self.messages, frames, now)?
        {
            self.fruitless = 0;
            self.handle(arrived, now, frames, done)?;
        }
        let bearable_us = self.silence_us();
        let State::Up(link) = &mut self.state else {
            return Ok(());
        };
        let silent_us = link.silent_us(&self.messages, now);
        if silent_us >= bearable_us {
            return Err(LinkError::Silent.into());
        }
        if silent_us >= self.config.timeouts.heartbeat_us && !self.messages.has_ping() {
            self.messages.add_ping(&self.session);
        }
        // What became due by the replies.
        Ok(link.send(&mut self.messages, self.arena.as_mut(), self.session.region, frames, now)?)
    }

    /// How long the server may be silent. One that answers hello and attach, and no more, may be
    /// reading from a slow disk: it is given twice as long each time, so that not every attempt is as
    /// vain as the first.
    fn silence_us(&self) -> u64 {
        let first = self.config.timeouts.silence_us;
        (first << self.fruitless).min(first.max(SILENCE_US_MAX))
    }

    /// Takes a reply.
    fn handle(
        &mut self,
        arrived: Arrived,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), Stop> {
        let Arrived { message, header } = arrived;
        self.messages.take_sent(message);
        self.note_lease(message, &header);
        let result = match (header.refusal, header.action) {
            (Some(code), _) => self.handle_refusal(code, message, &header, now)?,
            (None, Action::Read) => self.check_pages(message, &header, frames),
            (None, Action::Malloc) => self.handle_growth(message, &header),
            (None, Action::Write | Action::Commit | Action::Slots | Action::Map) => {
                self.learn_places(message, &header);
                Handled::Ended(Ok(()))
            }
            (None, _) => Handled::Ended(Ok(())),
        };
        match result {
            Handled::Ended(result) => {
                end_message(&mut self.messages, &mut self.operations, message, result, done);
            }
            Handled::SendAgain(due) => self.messages.send_again(message, due),
        }
        Ok(())
    }

    /// Takes what a reply says of the lease. To a write none says anything.
    fn note_lease(&mut self, message: MessageIndex, header: &Header) {
        if matches!(self.lease, MapLease::NoName | MapLease::Lost)
            || header.refusal.is_some()
            || header.action == Action::Write
        {
            return;
        }
        let sent = self.messages.get(message).sent_at;
        self.lease = match self.lease {
            _ if !header.leased => MapLease::Lost,
            MapLease::Since(before) => MapLease::Since(before.max(sent)),
            _ => MapLease::Since(sent),
        };
    }

    /// Checks every page against what was asked for.
    fn check_pages(
        &mut self,
        message: MessageIndex,
        header: &Header,
        frames: &dyn Frames,
    ) -> Handled {
        let State::Up(link) = &self.state else {
            return Handled::Ended(Ok(()));
        };
        let asked = self.messages.get(message);
        let entries = link.entries(header);
        for ((entry, wanted), frame) in entries.zip(&asked.wanted).zip(&asked.frames) {
            let wrong = |reason: String| StoreError::WrongPage {
                server: self.config.server.to_string(),
                page: wanted.page.get(),
                version: wanted.version.get(),
                reason,
            };
            if entry.page != wanted.page {
                let reason = format!("it sent page {} instead", entry.page);
                return Handled::Ended(Err(wrong(reason)));
            }
            if entry.version != wanted.version {
                let reason = format!("it sent version {} instead", entry.version);
                return Handled::Ended(Err(wrong(reason)));
            }
            let content = frames.bytes(*frame);
            let found = page_checksum(self.session.region, entry.page, entry.version, content);
            if let Some(arena) = &mut self.arena {
                arena.learn(&entry);
            }
            if found != entry.checksum {
                if asked.damaged < DAMAGED_TRIES_MAX {
                    self.messages.get_mut(message).damaged += 1;
                    return Handled::SendAgain(Nanos::new(0));
                }
                let reason = "the content does not match its checksum".to_owned();
                return Handled::Ended(Err(wrong(reason)));
            }
        }
        if let Some(Operation { outcome: Outcome::Fetched { server_nanos }, .. }) =
            asked.operation.and_then(|index| self.operations.get_mut(index))
        {
            *server_nanos += u64::from(header.server_nanos);
        }
        Handled::Ended(Ok(()))
    }

    /// Takes what a reply says of the server's memory.
    fn learn_places(&mut self, message: MessageIndex, header: &Header) {
        let (State::Up(link), Some(arena)) = (&self.state, &mut self.arena) else {
            return;
        };
        let pages = self.session.pages.get();
        // A table with an entry for every page up to one far away would take all memory.
        let ours = |entries| {
            Iterator::filter(entries, move |entry: &farmem_wire::PageEntry| {
                entry.page.get() < pages
            })
        };
        match header.action {
            Action::Write => {
                ours(link.entries(header)).for_each(|entry| arena.learn(&entry));
            }
            Action::Commit => {
                self.messages.get(message).entries().for_each(|entry| arena.learn(&entry));
                arena.add_fresh(Slots::decode_assigned(link.body(header)));
            }
            Action::Map => {
                ours(link.entries(header)).for_each(|entry| arena.learn_inherited(&entry));
            }
            _ => {
                let assigned = Slots::decode_assigned(link.body(header));
                arena.set_fresh(assigned.filter(|slot| !self.messages.uses_slot(*slot)));
            }
        }
    }

    /// Fetches what can be fetched without the server.
    fn fetch_shared(&mut self, frames: &mut dyn Frames, done: &mut Vec<Completion>) {
        let Some(arena) = &mut self.arena else { return };
        while let Some(load) = arena.returned() {
            let message = self.messages.get_mut(load.message);
            if load.kind == Kind::Placing {
                arena.placed(&load, message);
                self.messages.has_new = true;
                continue;
            }
            load.apply(message);
            if message.wanted.is_empty() {
                let (index, messages) = (load.message, &mut self.messages);
                end_message(messages, &mut self.operations, index, Ok(()), done);
            } else {
                message.seal_read();
                self.messages.unsent.push_back(load.message);
                self.messages.has_new = true;
            }
        }
        // Writes get their slots in the order in which they are sent: one that waits for slots waits for
        // the replies to those before it, and must not have given its own to one behind it.
        let (mut at, mut may_place) = (0, true);
        while let Some(index) = self.messages.unsent.get(at).copied() {
            let message = self.messages.get_mut(index);
            if !std::mem::take(&mut message.untried) {
                if may_place && message.may_be_placed() {
                    let region = self.session.region;
                    may_place = arena.begin_to_place(index, message, region, frames);
                }
                at += 1;
                continue;
            }
            if message.ahead && arena.carry(index, message, self.session.region, frames) {
                self.messages.unsent.remove(at);
                continue;
            }
            arena.fetch(message, self.session.region, frames);
            if !message.wanted.is_empty() {
                message.seal_read();
                at += 1;
                let unknown = arena.next_unknown(&message.wanted);
                if let Some(from) = unknown.filter(|_| self.messages.room() > 0) {
                    self.messages.add_map(&self.session, from);
                }
                continue;
            }
            self.messages.unsent.remove(at);
            end_message(&mut self.messages, &mut self.operations, index, Ok(()), done);
        }
    }

    fn handle_growth(&mut self, message: MessageIndex, header: &Header) -> Handled {
        let State::Up(link) = &self.state else {
            return Handled::Ended(Ok(()));
        };
        let Ok(reply) = MallocReply::decode(link.body(header)) else {
            let reason = "its answer to malloc is cut short".to_owned();
            return Handled::Ended(Err(self.refused(reason)));
        };
        if self.session.pages.get() == 0 {
            self.base = Some(reply.address);
        }
        self.session.pages = self.session.pages.max(reply.pages);
        self.session.granted = self.session.granted.max(reply.granted);
        let operation = self.messages.get(message).operation;
        if let Some(operation) = operation.and_then(|index| self.operations.get_mut(index)) {
            operation.outcome = Outcome::Grown { pages: self.session.pages };
        }
        Handled::Ended(Ok(()))
    }

    /// Decides what a refusal means; an error closes the store.
    fn handle_refusal(
        &mut self,
        code: RefusalCode,
        message: MessageIndex,
        header: &Header,
        now: Nanos,
    ) -> Result<Handled, Stop> {
        let State::Up(link) = &self.state else {
            return Ok(Handled::Ended(Ok(())));
        };
        let detail = link.entries(header).next();
        let full = FullBody::decode(link.body(header)).ok();
        let is_early = detail.is_some_and(|entry| self.messages.has_write(entry.page));
        let asked = self.messages.get_mut(message);
        match code {
            RefusalCode::Full => {
                let full = full.map_or((0, 0), |full| (full.asked.get(), full.free.get()));
                let server = self.config.server.to_string();
                let error = StoreError::Full { server, asked: full.0, free: full.1 };
                Ok(Handled::Ended(Err(error)))
            }
            // What was sent again had arrived the first time, and so had a newer version.
            RefusalCode::OldVersion if asked.resent => Ok(Handled::Ended(Ok(()))),
            // Nothing is there, which is what was wanted: it was never stored, or forgotten before.
            RefusalCode::AlreadyFree => Ok(Handled::Ended(Ok(()))),
            RefusalCode::WrongChecksum if asked.damaged < DAMAGED_TRIES_MAX => {
                asked.damaged += 1;
                if asked.header.action == Action::Commit {
                    asked.unplace();
                }
                Ok(Handled::SendAgain(now))
            }
            // The write that goes before it was refused as busy, and comes again.
            RefusalCode::NoPage | RefusalCode::WrongVersionOfPage if is_early => {
                Ok(Handled::SendAgain(now.plus_micros(BUSY_PAUSE_US)))
            }
            RefusalCode::NoSlot => {
                asked.unplace();
                Ok(Handled::SendAgain(now))
            }
            RefusalCode::NoSession
            | RefusalCode::WrongToken
            | RefusalCode::NotAttached
            | RefusalCode::StaleEpoch
            | RefusalCode::WrongIncarnation
            | RefusalCode::NoRegion => Err(Stop::Lost(code.text().to_owned())),
            _ if code.advice() == Advice::Retry => {
                let (pause_us, limit_us) = put_off(code, header.action, &self.config.timeouts);
                let (since, before_us) = asked.put_off.unwrap_or((now, 0));
                // A server whose source was away may be busy when it is back.
                let limit_us = limit_us.max(before_us);
                asked.put_off = Some((since, limit_us));
                if pause_us > 0 && now.since(since) / 1_000 < limit_us {
                    return Ok(Handled::SendAgain(now.plus_micros(pause_us)));
                }
                Ok(Handled::Ended(Err(self.refused(code.text().to_owned()))))
            }
            _ => {
                let about = detail.map_or(String::new(), |entry| {
                    format!(" (page {}, version there {})", entry.page, entry.version)
                });
                Ok(Handled::Ended(Err(self.refused(format!("{}{about}", code.text())))))
            }
        }
    }

    fn refused(&self, reason: String) -> StoreError {
        StoreError::Refused { server: self.config.server.to_string(), reason }
    }

    /// The connection is of no use any more: begins to make another one.
    fn link_broke(&mut self, error: &LinkError, now: Nanos) -> Result<(), StoreError> {
        self.fruitless += 1;
        let reason = error.to_string();
        if self.fruitless > FRUITLESS_LINKS_MAX {
            return Err(self.lost(reason));
        }
        self.messages.send_all_again();
        if self.lease != MapLease::NoName {
            // It was this connection's.
            self.lease = MapLease::Lost;
        }
        self.state = State::Down(Reconnect::new(reason, now));
        Ok(())
    }

    /// Goes on with making another connection.
    fn advance_reconnect(&mut self, now: Nanos) -> Result<(), StoreError> {
        let State::Down(reconnect) = &mut self.state else {
            return Ok(());
        };
        let shares = self.arena.is_some();
        match reconnect.advance(&self.config, &self.session, self.connection, shares, now) {
            Step::Waiting => Ok(()),
            Step::Up { socket, connection } => {
                self.connection = connection;
                self.state = State::Up(Link::new(Box::new(socket), now));
                if shares {
                    // Those that were assigned by replies that were lost are not named again.
                    self.messages.add_slots(&self.session);
                }
                Ok(())
            }
            Step::Lost(reason) => Err(self.lost(reason)),
        }
    }

    fn lost(&self, reason: String) -> StoreError {
        StoreError::Lost {
            server: self.config.server.to_string(),
            region: format!("region {} ({} pages)", self.session.region, self.session.pages),
            reason,
        }
    }

    /// Closes the store for good: every operation ends with the error.
    fn fail(&mut self, error: StoreError, done: &mut Vec<Completion>) -> StoreError {
        let operations = self.operations.take_all();
        done.extend(
            operations.map(|operation| Completion {
                ticket: operation.ticket,
                result: Err(error.clone()),
            }),
        );
        self.messages = Messages::default();
        self.state = State::Failed(error.clone());
        error
    }
}

impl PageStore for RemoteStore {
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError> {
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        match request {
            Request::Fetch(pages) | Request::FetchAhead(pages) => {
                let ahead = matches!(request, Request::FetchAhead(_));
                let pages = pages.iter().map(|fetch| {
                    (Wanted { page: fetch.page, version: fetch.version }, fetch.frame)
                });
                self.submit_pages(ticket, (Action::Read, ahead), pages)
            }
            Request::Store(pages) => {
                let pages = pages.iter().map(|store| {
                    (Wanted { page: store.page, version: store.version }, store.frame)
                });
                self.submit_pages(ticket, (Action::Write, false), pages)
            }
            Request::Release(ranges) => {
                let messages = ranges.len().div_ceil(RANGES_PER_MESSAGE_MAX);
                let operation = self.begin(ticket, Outcome::Released, messages)?;
                if let Some(arena) = &mut self.arena {
                    ranges.iter().for_each(|range| arena.forget(range));
                }
                for ranges in ranges.chunks(RANGES_PER_MESSAGE_MAX) {
                    self.messages.add_free(&self.session, operation, ranges);
                }
                Ok(())
            }
            Request::Grow(count) => self.submit_grow(ticket, count),
        }
    }

    fn advance(
        &mut self,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError> {
        if !matches!(self.state, State::Failed(_)) {
            self.fetch_shared(frames, done);
        }
        let result = match &self.state {
            State::Failed(error) => return Err(error.clone()),
            State::Down(_) => self.advance_reconnect(now),
            State::Up(_) => Ok(()),
        };
        let result = result.and_then(|()| match self.advance_link(now, frames, done) {
            Ok(()) => Ok(()),
            Err(Stop::Link(error)) => self.link_broke(&error, now),
            Err(Stop::Lost(reason)) => Err(self.lost(reason)),
        });
        result.map_err(|error| self.fail(error, done))
    }

    fn readiness(&self) -> Readiness {
        match &self.state {
            State::Failed(_) => {
                Readiness { descriptor: None, wants_write: false, deadline: Some(Nanos::new(0)) }
            }
            State::Down(reconnect) => reconnect.readiness(&self.config),
            State::Up(link) => {
                let waits = self.messages.is_waiting();
                let timeouts = &self.config.timeouts;
                let quiet = if self.messages.has_ping() {
                    self.silence_us()
                } else {
                    timeouts.heartbeat_us
                };
                let heartbeat = waits.then(|| link.last_heard.plus_micros(quiet));
                let delayed = self.messages.delayed.front().map(|(due, _)| *due);
                Readiness {
                    descriptor: Some(link.connection().descriptor().as_raw_fd()),
                    wants_write: link.is_blocked || self.messages.has_new,
                    deadline: heartbeat.into_iter().chain(delayed).min(),
                }
            }
        }
    }
}

/// Ends a message, and its operation if it was the last one.
fn end_message(
    messages: &mut Messages,
    operations: &mut Operations,
    message: MessageIndex,
    result: Result<(), StoreError>,
    done: &mut Vec<Completion>,
) {
    let operation = messages.get(message).operation;
    messages.remove(message);
    let Some(index) = operation else { return };
    if let (Err(error), Some(operation)) = (result, operations.get_mut(index)) {
        operation.error.get_or_insert(error);
    }
    if let Some(ended) = operations.message_ended(index) {
        let result = ended.error.map_or(Ok(ended.outcome), Err);
        done.push(Completion { ticket: ended.ticket, result });
    }
}

/// What a reply means for its message.
enum Handled {
    Ended(Result<(), StoreError>),
    /// To be sent again, not before that time.
    SendAgain(Nanos),
}

/// Why the connection cannot go on.
enum Stop {
    /// Another one may.
    Link(LinkError),
    /// None can.
    Lost(String),
}

impl From<LinkError> for Stop {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

/// The next so many items of an iterator whose length is known.
struct Chunk<'a, I> {
    pages: &'a mut I,
    left: usize,
}

impl<I: Iterator> Iterator for Chunk<'_, I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        self.left = self.left.checked_sub(1)?;
        self.pages.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Chunk<'_, I> {}
