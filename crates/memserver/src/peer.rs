//! One connection: bytes to requests, replies to bytes.
//!
//! ```text
//!            head complete: served at once
//!           +-----------+
//!           v           |        a write that is let in        all pages received
//!        [ Head ] ------+----------------------> [ Pages ] ----------------------> [ Head ]
//!           |                                                       (stored, acknowledged)
//!           +----------------------> [ Discard ] ----------------> [ Head ]
//!            a write that is refused              payload skipped, refused
//! ```
//!
//! A head is received into a small buffer, together with what follows it, so that a small request
//! costs one system call. Pages of a write go straight to their slots, apart from those that are
//! in the small buffer already.

use std::io::IoSliceMut;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Instant;

use farmem_region::{Nanos, PAGE_SIZE};
use farmem_transport::{Connection, Moved, recycle_mut, skip_bytes_mut};
use farmem_vmem::Slot;
use farmem_wire::{
    Action, AskMap, Attach, BODY_BYTES_MAX, BackupPlace, Copy, Create, DecodeError, Delete, Free,
    HEAD_BYTES_MAX, HEADER_BYTES, Header, Hello, List, Malloc, Open, PARTS_BYTES_MAX,
    PARTS_PER_MESSAGE_MAX, PageEntry, PartEntry, Prefer, ProtocolVersion, RangeEntry, RefusalCode,
    Resize, Setup, Slots, StatCount, seal, verify_body,
};

use crate::counters::{DropReason, count};
use crate::engine::{Bring, Caller, Detail, Engine, Refusal};
use crate::output::Output;

/// Room for one head with its body.
const INPUT_BYTES: usize = (HEAD_BYTES_MAX + BODY_BYTES_MAX).next_power_of_two();
/// Bytes that are asked for when a head is expected: a write of one page comes whole, and of a
/// long one no more than this is copied.
const HEAD_RECEIVE_BYTES: usize = 8 << 10;
/// Replies are sent when this many bytes of them wait, even if more requests are to be served:
/// the client looks at them meanwhile. Eight pages; with half of them the calls cost more than it
/// gains.
const SEND_FIRST_BYTES: usize = 32 << 10;
/// Within one turn the next replies wait until they are so many times more, which saves calls
/// where the client asks for much at a time...
const SEND_GROWTH: usize = 4;
/// ... up to this.
const SEND_BYTES_MAX: usize = 256 << 10;
/// Pages of a read that the processor is asked to bring near: they are copied once some more
/// requests have been looked at. Those of a longer read are copied at once, and prefetching them
/// cost a tenth of the speed where it gained a tenth with single pages.
const PREFETCH_PAGES_MAX: usize = 8;
/// Bytes that one peer may move before the others have their turn.
const TURN_BYTES: usize = 2 << 20;

/// A connection and what is known of it.
#[derive(Debug)]
pub(crate) struct Peer {
    connection: Box<dyn Connection>,
    /// The other machine's, or another process's on this one, over TCP.
    address: Option<SocketAddr>,
    caller: Caller,
    greeted: bool,
    stage: Stage,
    input: Box<[u8; INPUT_BYTES]>,
    /// Bytes of `input` that are to be looked at.
    unread: Range<usize>,
    output: Output,
    /// Whether requests that have been received are not served because too many replies wait, or
    /// because the next one is to be served where it may wait.
    held_back: bool,
    /// See [`Peer::waits`].
    waits: bool,
    /// See [`Peer::is_throttled`].
    is_throttled: bool,
    /// Whether the arena's descriptor rides on the next byte that is sent.
    passes_arena: bool,
    /// Entries of the write whose pages are being received.
    entries: Vec<PageEntry>,
    unused: Vec<Slot>,
    slices: Vec<IoSliceMut<'static>>,
    /// When the last bytes came, for the time that a reply reports.
    received_at: Instant,
    /// Since when the peer owes us something: its hello, or the rest of a message.
    owes_since: Option<Nanos>,
    /// Since when replies wait...
    blocked_since: Option<Nanos>,
    /// ...the last of which ends at this byte of all that is sent.
    blocked_until: u64,
    /// Bytes of replies that the session knows of.
    accounted: usize,
}

#[derive(Debug)]
enum Stage {
    /// A head is to be received.
    Head,
    /// Pages of a write are being received into fresh slots.
    Pages { header: Header, slots: Vec<Slot>, received: usize },
    /// The payload of a refused write is being skipped.
    Discard { header: Header, left: usize, refusal: Refusal },
}

impl Peer {
    pub(crate) fn new(connection: Box<dyn Connection>, engine: &Engine, now: Nanos) -> Self {
        // Asked for now: the kernel does not know it any more once the client has closed its side.
        let address = (!connection.passes_descriptors())
            .then(|| rustix::net::getpeername(connection.descriptor()).ok().flatten())
            .flatten()
            .and_then(|address| SocketAddr::try_from(address).ok());
        Self {
            connection,
            address,
            caller: engine.caller(),
            greeted: false,
            stage: Stage::Head,
            input: Box::new([0; INPUT_BYTES]),
            unread: 0..0,
            output: Output::default(),
            held_back: false,
            waits: false,
            is_throttled: false,
            passes_arena: false,
            entries: Vec::new(),
            unused: Vec::new(),
            slices: Vec::new(),
            received_at: Instant::now(),
            owes_since: Some(now),
            blocked_since: None,
            blocked_until: 0,
            accounted: 0,
        }
    }

    pub(crate) fn connection(&self) -> &dyn Connection {
        &*self.connection
    }

    /// Who it is, for people: the address of another machine's process, or the number of one on
    /// this machine.
    pub(crate) fn name(&self) -> String {
        let descriptor = self.connection.descriptor();
        if self.connection.passes_descriptors() {
            return match rustix::net::sockopt::socket_peercred(descriptor) {
                Ok(credentials) => format!("process {}", credentials.pid.as_raw_pid()),
                Err(_) => "a process that has gone".to_owned(),
            };
        }
        match self.address {
            Some(address) => address.to_string(),
            None => "an address that has gone".to_owned(),
        }
    }

    /// Whether to go on as soon as there is room in the socket: replies wait, or requests that
    /// are served once replies have gone.
    pub(crate) const fn wants_write(&self) -> bool {
        self.output.queued() > 0 || (self.held_back && !self.is_throttled)
    }

    /// Whether requests are not read because too many replies wait.
    pub(crate) fn is_full(&self, engine: &Engine) -> bool {
        self.is_throttled || self.output.queued() >= engine.config.limits.output_bytes_max
    }

    /// Whether requests are not read because too many replies wait for all connections of the
    /// session. Nobody says when they have gone: it is to be asked for.
    pub(crate) const fn is_throttled(&self) -> bool {
        self.is_throttled
    }

    /// Whether the peer may be dropped for being late, later on.
    pub(crate) const fn is_watched(&self) -> bool {
        self.owes_since.is_some() || self.blocked_since.is_some() || self.is_throttled
    }

    /// Whether the next request takes time that a thread with other peers does not have: then it is
    /// for [`Peer::serve_patiently`].
    pub(crate) const fn waits(&self) -> bool {
        self.waits
    }

    /// As [`Peer::serve`], but waits for disks and memory where it has to.
    pub(crate) fn serve_patiently(
        &mut self,
        engine: &Engine,
        now: Nanos,
    ) -> Result<bool, DropReason> {
        self.waits = false;
        self.caller.may_wait = true;
        let result = self.serve(engine, now);
        self.caller.may_wait = false;
        result
    }

    /// Receives, serves and replies as far as goes without waiting, or until the turn is over.
    /// Returns whether anything was received.
    pub(crate) fn serve(&mut self, engine: &Engine, now: Nanos) -> Result<bool, DropReason> {
        self.account();
        if self.held_back {
            self.flush(engine, now)?;
        }
        self.throttle(engine);
        let result = self.receive_and_serve(engine, now);
        if let Err(DropReason::BadFrame(_) | DropReason::NotARequest) = result {
            // Tell it why, if it still listens; it is dropped in any case.
            let about = Header::request(Action::Unknown(0), 0);
            push(&mut self.output, about.refused(RefusalCode::Malformed), |_| ());
        }
        self.flush(engine, now)?;
        if self.is_throttled {
            // If all has gone there is nothing to wait for.
            self.throttle(engine);
        }
        result
    }

    fn receive_and_serve(&mut self, engine: &Engine, now: Nanos) -> Result<bool, DropReason> {
        let mut received = 0;
        // What was left because too many replies waited.
        if self.held_back && !self.is_full(engine) {
            self.serve_received(engine, now)?;
        }
        while received < TURN_BYTES && !self.is_full(engine) && !self.waits {
            let (moved, room) = self.receive(engine)?;
            let Moved::Bytes(bytes) = moved else {
                if moved == Moved::Closed {
                    return Err(DropReason::Closed);
                }
                break;
            };
            received += bytes;
            self.received_at = Instant::now();
            self.serve_received(engine, now)?;
            // A call that did not fill its buffers has emptied the socket: asking again would
            // cost a system call to learn nothing.
            if bytes < room {
                break;
            }
        }
        if received > 0 {
            count(&engine.counters.bytes_in, received);
        }
        self.note_debt(engine, now);
        Ok(received > 0)
    }

    /// Sends what waits.
    fn flush(&mut self, engine: &Engine, now: Nanos) -> Result<(), DropReason> {
        if self.output.queued() == 0 {
            return Ok(());
        }
        let passed = self.passes_arena.then(|| engine.arena.descriptor());
        let sent = self.output.flush(&mut *self.connection, &engine.arena, passed);
        let sent = sent.map_err(DropReason::Broken)?;
        self.passes_arena &= sent == 0;
        count(&engine.counters.bytes_out, sent);
        if self.output.queued() == 0 {
            self.blocked_since = None;
        } else if self.blocked_since.is_none() || self.output.sent() >= self.blocked_until {
            self.blocked_since = Some(now);
            self.blocked_until = self.output.sent() + self.output.queued() as u64;
        }
        self.account();
        Ok(())
    }

    /// Tells the session how much waits here.
    fn account(&mut self) {
        let held = self.output.held();
        if self.caller.session.is_some() && self.accounted != held {
            self.caller.traffic.replies(self.accounted, held);
            self.accounted = held;
        }
    }

    /// Finds out whether more of what waits for the session may wait here. One connection may have as
    /// much as is free, so that those that take nothing leave room for the others; one for which nothing
    /// waits gets its reply even if nothing is free.
    fn throttle(&mut self, engine: &Engine) {
        self.account();
        let limit = engine.config.limits.session_output_bytes_max();
        let (here, all) = (self.output.held(), self.caller.traffic.outgoing());
        self.is_throttled = match here {
            0 => is_crowded(all, limit),
            _ => here >= limit.saturating_sub(all),
        };
    }

    /// Fails if the peer is late with something.
    pub(crate) fn check_time(&self, engine: &Engine, now: Nanos) -> Result<(), DropReason> {
        let limits = &engine.config.limits;
        let over = |since: Option<Nanos>, limit: std::time::Duration| {
            since.is_some_and(|since| u128::from(now.since(since)) >= limit.as_nanos())
        };
        if !self.greeted && over(self.owes_since, limits.hello_timeout) {
            return Err(DropReason::Silent);
        }
        if over(self.owes_since, limits.message_timeout) {
            return Err(DropReason::Stalled);
        }
        if over(self.blocked_since, limits.output_timeout) {
            return Err(DropReason::SlowReader);
        }
        // Others of a region that all share are not to wait for those that take nothing.
        let all = self.caller.traffic.outgoing();
        if over(self.blocked_since, limits.crowded_output_timeout)
            && is_crowded(all, limits.session_output_bytes_max())
            && self.caller.is_one_of_many()
        {
            return Err(DropReason::SlowReader);
        }
        Ok(())
    }

    /// Gives back all that the connection holds.
    pub(crate) fn close(mut self: Box<Self>, engine: &Engine, now: Nanos) {
        if let Stage::Pages { slots, .. } = std::mem::replace(&mut self.stage, Stage::Head) {
            engine.abandon_write(&self.caller, slots);
        }
        self.output.clear(&engine.arena);
        self.account();
        engine.leave(&mut self.caller, now);
    }

    /// Receives once, to where the next bytes belong. Returns also how many would have fitted.
    fn receive(&mut self, engine: &Engine) -> Result<(Moved, usize), DropReason> {
        let moved = match &mut self.stage {
            Stage::Pages { slots, received, .. } => {
                let mut slices = recycle_mut(std::mem::take(&mut self.slices));
                let room = slots.len() * PAGE_SIZE - *received;
                engine.arena.gather_mut(slots, &mut slices);
                let rest = skip_bytes_mut(&mut slices, *received);
                let moved = self.connection.receive(rest);
                self.slices = recycle_mut(slices);
                if let Ok(Moved::Bytes(bytes)) = moved {
                    *received += bytes;
                }
                moved.map(|moved| (moved, room))
            }
            Stage::Head | Stage::Discard { .. } => {
                self.input.copy_within(self.unread.clone(), 0);
                self.unread = 0..self.unread.len();
                // The rest of a head that is longer than usual is asked for whole.
                let end = match self.unread.len() {
                    0..HEAD_RECEIVE_BYTES => HEAD_RECEIVE_BYTES,
                    _ => INPUT_BYTES,
                };
                let room = &mut self.input[self.unread.end..end];
                let bytes = room.len();
                let moved = self.connection.receive(&mut [IoSliceMut::new(room)]);
                if let Ok(Moved::Bytes(bytes)) = moved {
                    self.unread.end += bytes;
                }
                moved.map(|moved| (moved, bytes))
            }
        };
        moved.map_err(DropReason::Broken)
    }

    /// Serves what is complete.
    fn serve_received(&mut self, engine: &Engine, now: Nanos) -> Result<(), DropReason> {
        let mut send_at = SEND_FIRST_BYTES;
        self.held_back = false;
        loop {
            let goes_on = match &mut self.stage {
                Stage::Head => self.serve_head(engine)?,
                Stage::Pages { .. } => self.serve_pages(engine),
                Stage::Discard { left, .. } => {
                    let skipped = self.unread.len().min(*left);
                    self.unread.start += skipped;
                    *left -= skipped;
                    self.finish_discard(engine)
                }
            };
            if !goes_on {
                return Ok(());
            }
            // A message is complete: what follows is the next one's time.
            if self.greeted {
                self.owes_since = None;
            }
            self.throttle(engine);
            if self.output.queued() >= send_at {
                self.flush(engine, now)?;
                send_at = match self.output.queued() {
                    0 => SEND_BYTES_MAX.min(send_at * SEND_GROWTH),
                    // The socket is full: the rest goes when the kernel says so.
                    _ => usize::MAX,
                };
            }
            if self.is_full(engine) {
                self.held_back = true;
                return Ok(());
            }
        }
    }

    /// Serves a head if it is complete; returns whether it was.
    fn serve_head(&mut self, engine: &Engine) -> Result<bool, DropReason> {
        let unread = &self.input[self.unread.clone()];
        let Some((head, rest)) = unread.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(false);
        };
        let header = Header::decode(head)?;
        if header.reply {
            return Err(DropReason::NotARequest);
        }
        let Some(covered) = rest.get(..header.covered_bytes()) else {
            return Ok(false);
        };
        verify_body(&header, covered)?;
        let start = self.unread.start + HEADER_BYTES;
        self.unread.start = start + covered.len();
        if !self.greeted && header.action != Action::Hello {
            self.refuse(engine, &header, RefusalCode::HelloFirst.into());
            return Ok(true);
        }
        if header.action != Action::Hello && header.version != ProtocolVersion::V1.number() {
            return Err(DecodeError::Version(header.version).into());
        }
        let entries = start..start + header.entry_bytes();
        let body = entries.end..self.unread.start;
        let header = Header { leased: self.tell_news(engine, &header), ..header };
        let served = match header.action {
            Action::Write => self.begin_write(engine, header, start),
            Action::Hello => {
                self.greet(engine, &header, body)?;
                Ok(())
            }
            _ => self.serve_request(engine, &header, entries, body).map(|nanos| {
                engine.counters.served.granted(header.action, nanos);
            }),
        };
        match served {
            Ok(()) => {}
            Err(refusal) if refusal == Refusal::waits() => {
                self.unread.start = start - HEADER_BYTES;
                self.waits = true;
                self.held_back = true;
                return Ok(false);
            }
            Err(refusal) => self.refuse(engine, &header, refusal),
        }
        Ok(true)
    }

    /// Tells what others have changed, ahead of the reply to a request, if the client wants to know.
    /// Returns whether the reply tells it that its lease goes on. To a write it does not: the
    /// request has not arrived whole.
    fn tell_news(&mut self, engine: &Engine, header: &Header) -> bool {
        if header.action == Action::Write {
            return false;
        }
        if !self.caller.listens {
            return self.caller.holds_lease && engine.renew_lease(&self.caller, header);
        }
        let (caller, mut leased) = (&self.caller, false);
        self.output.push_head(|bytes, start| {
            bytes.resize(start + HEADER_BYTES, 0);
            let mut entries = 0;
            let (reply, renewed) = engine.tell_news(caller, header, |change| {
                change.encode(bytes);
                entries += 1;
            });
            leased = renewed;
            let Some(reply) = reply else {
                bytes.truncate(start);
                return;
            };
            reply.encode(bytes);
            let head =
                Header { action: Action::Map, news: true, leased, entries, ..header.granted() };
            seal(head, &mut bytes[start..]);
        });
        leased
    }

    /// Answers hello. The body lies in the input.
    fn greet(
        &mut self,
        engine: &Engine,
        header: &Header,
        body: Range<usize>,
    ) -> Result<(), DropReason> {
        let Ok(hello) = Hello::decode(&self.input[body]) else {
            self.refuse(engine, header, RefusalCode::Malformed.into());
            return Ok(());
        };
        let local = self.connection.passes_descriptors();
        let Some(reply) = engine.hello(&mut self.caller, &hello, local) else {
            self.refuse(engine, header, RefusalCode::WrongVersion.into());
            let Hello { oldest, newest, .. } = hello;
            return Err(DropReason::Version { oldest, newest });
        };
        self.greeted = true;
        self.passes_arena = reply.arena_shared;
        let granted = Header { incarnation: engine.incarnation(), ..header.granted() };
        push(&mut self.output, granted, |bytes| reply.encode(bytes));
        engine.counters.served.granted(Action::Hello, nanos_since(self.received_at));
        Ok(())
    }

    /// Serves a request that is complete. `entries` and `body` lie in the input. Returns how long
    /// that took, from the arrival of the request's last byte on.
    fn serve_request(
        &mut self,
        engine: &Engine,
        header: &Header,
        entries: Range<usize>,
        body: Range<usize>,
    ) -> Result<u32, Refusal> {
        let rest @ (entries, body) = (&self.input[entries], &self.input[body]);
        let (output, caller, unused) = (&mut self.output, &mut self.caller, &mut self.unused);
        let granted = header.granted();
        if takes_long(header.action) && !caller.may_wait {
            return Err(Refusal::waits());
        }
        match header.action {
            Action::Setup => {
                let (session, body) = engine.setup(caller, header, &Setup::decode(body)?)?;
                push(output, answer(header, session), |bytes| body.encode(bytes));
            }
            Action::Attach => {
                let (session, body) = engine.attach(caller, header, &Attach::decode(body)?)?;
                push(output, answer(header, session), |bytes| body.encode(bytes));
            }
            Action::Malloc => {
                let reply = engine.malloc(caller, header, &Malloc::decode(body)?)?;
                push(output, granted, |bytes| reply.encode(bytes));
            }
            Action::Read => {
                return read(engine, caller, output, header, entries, self.received_at);
            }
            action if is_about_parts(action) => serve_parts(engine, caller, output, header, rest)?,
            Action::Free => {
                let ranges = RangeEntry::decode_all(entries);
                engine.free(caller, header, ranges, Free::decode(body)?, unused)?;
                push(output, granted, |_| ());
            }
            Action::Slots => {
                let wanted = Slots::decode(body)?.wanted as usize;
                push_list(output, granted, |list| {
                    engine.assign_slots(caller, header, wanted, unused, list)
                })?;
            }
            Action::Commit => push_list(output, granted, |list| {
                let entries = PageEntry::decode_all(entries);
                engine.commit_slots(caller, header, entries, unused, list)
            })?,
            action if is_about_a_whole(action) => {
                serve_named(engine, caller, output, header, body)?;
            }
            Action::Initialise
            | Action::Prefetch
            | Action::Pin
            | Action::Unpin
            | Action::Invalidate
            | Action::Flush => serve_ranges(engine, caller, output, header, entries, unused)?,
            Action::Prefer => {
                let ranges = RangeEntry::decode_all(entries);
                let progress = engine.prefer(caller, header, ranges, &Prefer::decode(body)?)?;
                push(output, granted, |bytes| progress.encode(bytes));
            }
            Action::Map => tell_map(engine, caller, output, header, &AskMap::decode(body)?)?,
            Action::Disconnect => {
                engine.disconnect(header)?;
                push(output, granted, |_| ());
            }
            Action::Stat => push(output, granted, |bytes| tell_stat(engine, bytes)),
            Action::Ping => push(output, granted, |_| ()),
            _ => return Err(RefusalCode::Unsupported.into()),
        }
        Ok(nanos_since(self.received_at))
    }

    /// Lets a write's pages in, or skips them. Refuses only with [`Refusal::waits`].
    fn begin_write(
        &mut self,
        engine: &Engine,
        header: Header,
        entries_start: usize,
    ) -> Result<(), Refusal> {
        let bytes = &self.input[entries_start..entries_start + header.entry_bytes()];
        self.entries.clear();
        self.entries.extend(PageEntry::decode_all(bytes));
        let mut slots = self.output.spare_list();
        let entries = self.entries.iter().copied();
        match engine.begin_write(&self.caller, &header, entries, &mut slots) {
            Ok(()) => self.stage = Stage::Pages { header, slots, received: 0 },
            Err(refusal) => {
                self.output.keep_list(slots);
                if refusal == Refusal::waits() {
                    return Err(refusal);
                }
                let left = header.payload_bytes();
                self.stage = Stage::Discard { header, left, refusal };
            }
        }
        Ok(())
    }

    /// Moves what is in the input to the slots, and stores them if they are complete; returns
    /// whether they were.
    fn serve_pages(&mut self, engine: &Engine) -> bool {
        let Stage::Pages { header, slots, received } = &mut self.stage else {
            return false;
        };
        let total = slots.len() * PAGE_SIZE;
        while *received < total && !self.unread.is_empty() {
            let page = engine.arena.bytes_mut(&mut slots[*received / PAGE_SIZE]);
            let room = &mut page[*received % PAGE_SIZE..];
            let bytes = room.len().min(self.unread.len());
            let start = self.unread.start;
            room[..bytes].copy_from_slice(&self.input[start..start + bytes]);
            self.unread.start += bytes;
            *received += bytes;
        }
        if *received < total {
            return false;
        }
        let header = *header;
        let mut slots = std::mem::take(slots);
        self.stage = Stage::Head;
        let mut result = Ok(());
        self.output.push_head(|bytes, start| {
            bytes.resize(start + HEADER_BYTES, 0);
            let (caller, unused) = (&self.caller, &mut self.unused);
            let entries = &self.entries;
            result = engine.commit_write(caller, &header, entries, &mut slots, unused, |entry| {
                // Where its pages are matters to a client that reads them there.
                if caller.shares_arena {
                    entry.encode(bytes);
                }
            });
            if result.is_err() {
                bytes.truncate(start);
                return;
            }
            let entries = if caller.shares_arena { header.entries } else { 0 };
            seal(Header { entries, ..header.granted() }, &mut bytes[start..]);
        });
        self.output.keep_list(slots);
        match result {
            Ok(()) => {
                let nanos = nanos_since(self.received_at);
                engine.counters.served.granted(header.action, nanos);
            }
            Err(refusal) => self.refuse(engine, &header, refusal),
        }
        true
    }

    /// Refuses a write whose payload has been skipped; returns whether it has.
    fn finish_discard(&mut self, engine: &Engine) -> bool {
        let Stage::Discard { header, left: 0, refusal } = self.stage else {
            return false;
        };
        self.stage = Stage::Head;
        self.refuse(engine, &header, refusal);
        true
    }

    fn refuse(&mut self, engine: &Engine, header: &Header, refusal: Refusal) {
        let nanos = nanos_since(self.received_at);
        engine.counters.served.refused(header.action, refusal.code, nanos);
        engine.tell_mistake(|| self.name(), &self.caller, header.action, refusal.code);
        let mut reply = header.refused(refusal.code);
        reply.entries = u32::from(matches!(refusal.detail, Detail::Page(_)));
        push(&mut self.output, reply, |bytes| match refusal.detail {
            Detail::None | Detail::Waits => {}
            Detail::Page(entry) => entry.encode(bytes),
            Detail::Full(body) => body.encode(bytes),
            Detail::Taken(taken) => engine.taken_body(&taken).encode(bytes),
        });
    }

    /// Does the peer owe us its hello, or the rest of a message?
    fn note_debt(&mut self, engine: &Engine, now: Nanos) {
        let is_between = matches!(self.stage, Stage::Head) && self.unread.is_empty();
        if self.greeted && (is_between || self.is_full(engine)) {
            self.owes_since = None;
        } else {
            self.owes_since.get_or_insert(now);
        }
    }
}

/// Whether so much waits for all connections of a session that nothing is served any more.
const fn is_crowded(waiting: usize, limit: usize) -> bool {
    waiting >= limit.saturating_mul(2)
}

/// Whether a request is about a named region as a whole.
const fn is_about_a_whole(action: Action) -> bool {
    matches!(
        action,
        Action::Create
            | Action::Open
            | Action::List
            | Action::Show
            | Action::Delete
            | Action::Resize
            | Action::Clone
            | Action::Snapshot
            | Action::Backup
            | Action::Restore
    )
}

/// Whether a request is about parts of pages.
const fn is_about_parts(action: Action) -> bool {
    matches!(action, Action::ReadParts | Action::WriteParts | Action::FreeParts)
}

/// Whether a request may keep its thread for tens of milliseconds.
const fn takes_long(action: Action) -> bool {
    matches!(
        action,
        Action::Create
            | Action::Delete
            | Action::Resize
            | Action::Initialise
            | Action::Prefetch
            | Action::Pin
            | Action::Flush
            | Action::Backup
            | Action::Restore
    )
}

/// Serves a read: the reply's pages are sent from their slots. Returns how long it took.
fn read(
    engine: &Engine,
    caller: &Caller,
    output: &mut Output,
    header: &Header,
    entries: &[u8],
    received_at: Instant,
) -> Result<u32, Refusal> {
    let mut slots = output.spare_list();
    let (mut result, mut nanos) = (Ok(()), 0);
    let wanted = PageEntry::decode_all(entries);
    output.push_head(|bytes, start| {
        bytes.resize(start + HEADER_BYTES, 0);
        result = engine.read(caller, header, wanted, &mut slots, |entry| {
            entry.encode(bytes);
        });
        if result.is_err() {
            bytes.truncate(start);
            return;
        }
        let count = u32::try_from(slots.len()).expect("at most PAGES_PER_MESSAGE_MAX");
        nanos = nanos_since(received_at);
        let reply = Header {
            entries: count,
            payload: count * PAGE_SIZE as u32,
            server_nanos: nanos,
            ..header.granted()
        };
        seal(reply, &mut bytes[start..]);
    });
    if slots.len() <= PREFETCH_PAGES_MAX {
        slots.iter().for_each(|slot| engine.arena.prefetch(slot));
    }
    if slots.is_empty() {
        output.keep_list(slots);
    } else {
        output.push_pages(slots);
    }
    result.map(|()| nanos)
}

/// Serves a request about parts of pages.
fn serve_parts(
    engine: &Engine,
    caller: &Caller,
    output: &mut Output,
    header: &Header,
    (entries, body): (&[u8], &[u8]),
) -> Result<(), Refusal> {
    match header.action {
        Action::ReadParts => return read_parts(engine, caller, output, header, entries),
        Action::WriteParts => engine.write_parts(caller, header, &parts_of(entries), body)?,
        _ => engine.free_parts(caller, header, &parts_of(entries))?,
    }
    push(output, header.granted(), |_| ());
    Ok(())
}

/// Serves a read of parts: they are copied, as they are small.
fn read_parts(
    engine: &Engine,
    caller: &Caller,
    output: &mut Output,
    header: &Header,
    entries: &[u8],
) -> Result<(), Refusal> {
    let wanted = parts_of(entries);
    let bytes: usize = wanted.iter().map(|part| usize::from(part.bytes)).sum();
    if bytes > PARTS_BYTES_MAX || wanted.len() > PARTS_PER_MESSAGE_MAX {
        return Err(RefusalCode::Malformed.into());
    }
    let (mut entries, mut parts) = (Vec::new(), Vec::with_capacity(bytes));
    engine.read_parts(caller, header, &wanted, |part, content| {
        part.encode(&mut entries);
        parts.extend_from_slice(content);
    })?;
    let count = u32::try_from(wanted.len()).expect("at most PARTS_PER_MESSAGE_MAX");
    push(output, Header { entries: count, ..header.granted() }, |bytes| {
        bytes.extend_from_slice(&entries);
        bytes.extend_from_slice(&parts);
    });
    Ok(())
}

fn parts_of(entries: &[u8]) -> Vec<PartEntry> {
    PartEntry::decode_all(entries).collect()
}

/// Nanoseconds; saturates after four seconds.
fn nanos_since(time: Instant) -> u32 {
    u32::try_from(time.elapsed().as_nanos()).unwrap_or(u32::MAX)
}

/// Serves a request about a named region as a whole.
fn serve_named(
    engine: &Engine,
    caller: &mut Caller,
    output: &mut Output,
    header: &Header,
    body: &[u8],
) -> Result<(), Refusal> {
    let info = match header.action {
        Action::Open => {
            let (session, granted) = engine.open(caller, &Open::decode(body)?)?;
            push(output, answer(header, session), |bytes| granted.encode(bytes));
            return Ok(());
        }
        Action::List => {
            let infos = engine.list(&List::decode(body)?);
            push(output, header.granted(), |bytes| {
                infos.iter().for_each(|info| info.encode(bytes));
            });
            return Ok(());
        }
        Action::Backup => {
            let BackupPlace { flag, path, .. } = BackupPlace::decode(body)?;
            let progress = engine.back_up(caller, header, path, flag)?;
            push(output, header.granted(), |bytes| progress.encode(bytes));
            return Ok(());
        }
        Action::Delete => {
            engine.delete(caller, header, Delete::decode(body)?)?;
            push(output, header.granted(), |_| ());
            return Ok(());
        }
        Action::Create => engine.create(&Create::decode(body)?)?,
        Action::Restore => {
            let BackupPlace { flag, name, path } = BackupPlace::decode(body)?;
            engine.restore(path, name, flag)?
        }
        Action::Resize => engine.resize(caller, header, &Resize::decode(body)?)?,
        Action::Clone => engine.copy_region(caller, header, &Copy::decode(body)?, false)?,
        Action::Snapshot => engine.copy_region(caller, header, &Copy::decode(body)?, true)?,
        _ => engine.show(caller, header)?,
    };
    push(output, header.granted(), |bytes| info.encode(bytes));
    Ok(())
}

fn tell_stat(engine: &Engine, bytes: &mut Vec<u8>) {
    engine.stat().encode(bytes);
    StatCount::encode_all(engine.counters.served.counts(), bytes);
}

/// Tells which pages are stored: their entries, then the rest in a body.
fn tell_map(
    engine: &Engine,
    caller: &mut Caller,
    output: &mut Output,
    header: &Header,
    ask: &AskMap,
) -> Result<(), Refusal> {
    let mut result = Ok(());
    output.push_head(|bytes, start| {
        bytes.resize(start + HEADER_BYTES, 0);
        let mut entries = 0;
        let told = engine.map(caller, header, ask, |entry| {
            entry.encode(bytes);
            entries += 1;
        });
        match told {
            Ok((reply, leased)) => {
                caller.holds_lease |= leased;
                caller.listens |= ask.news;
                reply.encode(bytes);
                seal(Header { entries, leased, ..header.granted() }, &mut bytes[start..]);
            }
            Err(refusal) => {
                bytes.truncate(start);
                result = Err(refusal);
            }
        }
    });
    result
}

/// Serves a request about ranges of a region.
fn serve_ranges(
    engine: &Engine,
    caller: &Caller,
    output: &mut Output,
    header: &Header,
    entries: &[u8],
    unused: &mut Vec<Slot>,
) -> Result<(), Refusal> {
    let ranges = RangeEntry::decode_all(entries);
    let progress = match header.action {
        Action::Initialise => engine.bring(caller, header, ranges, Bring::Initialise)?,
        Action::Prefetch if entries.is_empty() => engine.prefetch_working_set(caller, header)?,
        Action::Prefetch => engine.bring(caller, header, ranges, Bring::Prefetch)?,
        Action::Pin => engine.bring(caller, header, ranges, Bring::Pin)?,
        Action::Unpin => engine.unpin(caller, header, ranges)?,
        Action::Invalidate => {
            engine.free(caller, header, ranges, Free { also_pinned: false }, unused)?
        }
        _ => engine.flush(caller, header, ranges)?,
    };
    push(output, header.granted(), |bytes| progress.encode(bytes));
    Ok(())
}

/// Queues a reply whose body is the list of slots that `serve` makes, unless it refuses.
fn push_list(
    output: &mut Output,
    granted: Header,
    serve: impl FnOnce(&mut dyn FnMut(u32)) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    let mut result = Ok(());
    output.push_head(|bytes, start| {
        bytes.resize(start + HEADER_BYTES, 0);
        result = serve(&mut |slot| Slots::encode_assigned(slot, bytes));
        if result.is_ok() {
            seal(granted, &mut bytes[start..]);
        } else {
            bytes.truncate(start);
        }
    });
    result
}

/// The reply to setup and attach, which tells all about the session.
const fn answer(request: &Header, session: Header) -> Header {
    Header { action: request.action, request: request.request, reply: true, ..session }
}

/// Queues a message of header, entries and body, the latter two written by `rest`.
fn push(output: &mut Output, header: Header, rest: impl FnOnce(&mut Vec<u8>)) {
    output.push_head(|bytes, start| {
        bytes.resize(start + HEADER_BYTES, 0);
        rest(bytes);
        seal(header, &mut bytes[start..]);
    });
}
