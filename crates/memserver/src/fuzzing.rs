//! What fuzzing asks of this crate, run by the targets in `fuzz/fuzz_targets`, and on their seeds by
//! every test run: [`peer`] plays connections without sockets to a whole engine, the others read
//! what comes from files and from visitors of the port for metrics.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use farmem_region::{
    ByteCount, Checksum, Nanos, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, SessionId,
    Version,
};
use farmem_transport::{Connection, Moved};
use farmem_wire::{
    Action, AskMap, Attach, AttachMode, BackupPlace, Copy, Create, Delete, FileRange, HEADER_BYTES,
    Header, Hello, List, Malloc, Open, PAGE_SIZES, PageEntry, PartEntry, Payload, RangeEntry,
    Setup, Slots, Source, crc32c, page_checksum, part_checksum, seal, verify_body,
};

use crate::ServerConfig;
use crate::backup::Manifest;
use crate::engine::Engine;
use crate::journal::{Record, replay};
use crate::peer::Peer;
use crate::tiers::Tiers;

/// Connections that a script plays.
const SEATS: usize = 3;
/// Pages of the server's memory: all that a script can store fits at once, or is refused.
const MEMORY_PAGES: u64 = 1024;
const NAMES: [&str; 4] = ["one", "two", "three", ""];

/// Plays a script: what its connections send, byte by byte, and what happens meanwhile. Every reply
/// must be a message whose checksums match, and at the end everything must be free.
///
/// # Panics
/// If that is not so.
pub fn peer(script: &[u8]) {
    let mut stage = Stage::new();
    let mut script = Script(script);
    while stage.step(&mut script).is_some() {}
    stage.end();
}

/// Takes bytes for the table of a backup, with its checksum made right.
///
/// # Panics
/// If it is decoded to what it does not say.
pub fn backup_table(input: &[u8]) {
    let _ = Manifest::decode(input);
    let sealed = [input, &crc32c(input).to_le_bytes()].concat();
    if let Ok(manifest) = Manifest::decode(&sealed) {
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
    }
}

/// Takes bytes for a journal, with the checksum of each record made right: a table is made from it
/// or it is refused.
///
/// # Panics
/// If a record is not what its bytes say.
pub fn journal(input: &[u8]) {
    let mut records = input.to_vec();
    let mut at = 0;
    while let Some(length) = records.get(at + 4..at + 6) {
        let length = usize::from(u16::from_le_bytes([length[0], length[1]])).max(8);
        let Some(record) = records.get_mut(at..at + length) else { break };
        let crc = crc32c(&record[4..]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
        at += length;
    }
    let mut rest = &records[..];
    while let Ok((record, bytes)) = Record::decode(rest) {
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(Record::decode(&again), Ok((record, again.len())));
        rest = &rest[bytes..];
    }
    for records in [input, &records] {
        let mut tiers = Tiers::dram_only(64).expect("memory for a few pages");
        tiers.begin_replay();
        let _ = replay(records, &tiers);
    }
}

/// Takes bytes for the head of an HTTP request.
///
/// # Panics
/// If the answer to it is none.
pub fn http_request(input: &[u8]) {
    if let Some(answer) = crate::http::answer(input, &|| "figures\n".to_owned()) {
        assert!(answer.starts_with(b"HTTP/1.1 "));
    }
}

/// What is left of a script.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    /// At most so many bytes.
    fn bytes(&mut self, count: u8) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(self.0.len().min(count.into()));
        self.0 = rest;
        bytes
    }
}

/// Both directions of a connection that goes nowhere.
#[derive(Debug)]
struct Line {
    to_server: VecDeque<u8>,
    from_server: Vec<u8>,
    /// Bytes that the client's side takes before it is full.
    room: usize,
}

#[derive(Debug)]
struct Loop {
    line: Arc<Mutex<Line>>,
    descriptor: OwnedFd,
    passes_descriptors: bool,
}

impl Connection for Loop {
    fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<Moved> {
        let mut line = lock(&self.line);
        let mut sent = 0;
        for slice in slices {
            let bytes = slice.len().min(line.room);
            line.from_server.extend_from_slice(&slice[..bytes]);
            line.room -= bytes;
            sent += bytes;
        }
        Ok(if sent > 0 { Moved::Bytes(sent) } else { Moved::WouldBlock })
    }

    fn receive(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<Moved> {
        let mut line = lock(&self.line);
        let mut received = 0;
        for slice in slices {
            let bytes = slice.len().min(line.to_server.len());
            for (to, from) in slice.iter_mut().zip(line.to_server.drain(..bytes)) {
                *to = from;
            }
            received += bytes;
        }
        Ok(if received > 0 { Moved::Bytes(received) } else { Moved::WouldBlock })
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    fn peer_processor(&self) -> Option<usize> {
        None
    }

    fn passes_descriptors(&self) -> bool {
        self.passes_descriptors
    }

    fn send_with(&mut self, slices: &[IoSlice<'_>], _: BorrowedFd<'_>) -> io::Result<Moved> {
        self.send(slices)
    }

    fn receive_with(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
    ) -> io::Result<(Moved, Option<OwnedFd>)> {
        self.receive(slices).map(|moved| (moved, None))
    }
}

/// A client's place: a connection, and what its client knows.
#[derive(Debug)]
struct Seat {
    peer: Option<Box<Peer>>,
    line: Arc<Mutex<Line>>,
    /// With session, region, epoch, incarnation and token as they were granted last.
    session: Header,
}

/// A server and its clients.
#[derive(Debug)]
struct Stage {
    engine: Engine,
    now: Nanos,
    nowhere: OwnedFd,
    seats: [Seat; SEATS],
    /// Whether slots may have been assigned: those of a session that times out are never used again.
    has_assigned: bool,
}

impl Stage {
    fn new() -> Self {
        let memory = PageCount::new(MEMORY_PAGES).bytes();
        let mut config = ServerConfig::new(Vec::new(), memory);
        config.share_arena = true;
        config.tiers.compressed = ByteCount::new(2 * memory.get());
        config.promise_max = Some(memory);
        let engine = Engine::new(config).expect("memory for the engine");
        let nowhere = OwnedFd::from(File::open("/dev/null").expect("open /dev/null"));
        let seats = std::array::from_fn(|_| Seat {
            peer: None,
            line: Arc::new(Mutex::new(Line {
                to_server: VecDeque::new(),
                from_server: Vec::new(),
                room: usize::MAX,
            })),
            session: Header::request(Action::Ping, 0),
        });
        Self { engine, now: Nanos::new(1), nowhere, seats, has_assigned: false }
    }

    /// Plays one step; `None` at the end of the script.
    fn step(&mut self, script: &mut Script<'_>) -> Option<()> {
        let head = script.byte()?;
        let (who, kind) = (usize::from(head & 3), head >> 2 & 7);
        if who == SEATS {
            return self.happen(kind, script);
        }
        self.sit_down(who, head >> 5 == 0);
        if kind == 0 {
            let count = script.byte()?;
            self.send(who, script.bytes(count));
            return Some(());
        }
        let action = script.byte()?;
        self.has_assigned |= Action::from_number(action) == Action::Slots;
        let message = self.seats[who].message(kind, action, script)?;
        if kind == 3 {
            let (one, two) = message.split_at(usize::from(script.byte()?) * message.len() / 256);
            self.send(who, one);
            self.send(who, two);
        } else {
            self.send(who, &message);
        }
        Some(())
    }

    /// Something that no message causes.
    fn happen(&mut self, kind: u8, script: &mut Script<'_>) -> Option<()> {
        let operand = script.byte()?;
        let seat = usize::from(operand) % SEATS;
        match kind {
            0 => {
                self.now = self.now.plus_micros(u64::from(operand) * 100_000);
                let late = |peer: &Peer| peer.check_time(&self.engine, self.now).is_err();
                let dropped =
                    self.seats.each_ref().map(|seat| seat.peer.as_deref().is_some_and(late));
                (0..SEATS).filter(|seat| dropped[*seat]).for_each(|seat| self.leave(seat));
                self.engine.end_orphans(self.now, |_, _| ());
            }
            1 => {
                self.engine.demote(operand.into());
            }
            2 => self.leave(seat),
            3 => {
                let room = usize::from(operand) * 1000;
                lock(&self.seats[seat].line).room = room;
            }
            4 => {
                lock(&self.seats[seat].line).room = usize::MAX;
                self.serve(seat);
            }
            _ => {
                self.engine.give_back().expect("give memory back");
            }
        }
        Some(())
    }

    /// Connects a client, and says hello for it unless it wants to do so itself.
    fn sit_down(&mut self, who: usize, greets: bool) {
        if self.seats[who].peer.is_some() {
            return;
        }
        let descriptor = self.nowhere.try_clone().expect("duplicate a descriptor");
        let passes_descriptors = who == 0;
        let line = Arc::clone(&self.seats[who].line);
        *lock(&line) =
            Line { to_server: VecDeque::new(), from_server: Vec::new(), room: usize::MAX };
        let connection = Box::new(Loop { line, descriptor, passes_descriptors });
        self.seats[who].peer = Some(Box::new(Peer::new(connection, &self.engine, self.now)));
        if greets {
            let mut hello = vec![0; HEADER_BYTES];
            Hello { oldest: 1, newest: 1, share_arena: true }.encode(&mut hello);
            seal(Header::request(Action::Hello, 0), &mut hello);
            self.send(who, &hello);
        }
    }

    fn leave(&mut self, who: usize) {
        if let Some(peer) = self.seats[who].peer.take() {
            peer.close(&self.engine, self.now);
        }
    }

    fn send(&mut self, who: usize, bytes: &[u8]) {
        lock(&self.seats[who].line).to_server.extend(bytes);
        self.serve(who);
    }

    /// Serves a connection as a worker does, until nothing is left to do.
    fn serve(&mut self, who: usize) {
        let Some(peer) = &mut self.seats[who].peer else { return };
        let dropped = loop {
            match peer.serve(&self.engine, self.now) {
                Err(reason) => break Some(reason),
                Ok(_) if peer.waits() => {
                    if let Err(reason) = peer.serve_patiently(&self.engine, self.now) {
                        break Some(reason);
                    }
                }
                Ok(received) => {
                    if !received {
                        break None;
                    }
                }
            }
        };
        self.seats[who].read_replies();
        if dropped.is_some() {
            self.leave(who);
        }
    }

    /// All clients leave, named regions are deleted, and everything is free.
    fn end(mut self) {
        (0..SEATS).for_each(|seat| self.leave(seat));
        let life = self.engine.config.limits.session_timeout + Duration::from_secs(1);
        let later = u64::try_from(life.as_micros()).expect("seconds");
        self.engine.end_orphans(self.now.plus_micros(later), |_, _| ());
        while let Some(info) = self.engine.list(&List { after: RegionId::new(0) }).pop() {
            let mut caller = self.engine.caller();
            let open = Open { take_over: true, name: &info.name };
            let (session, granted) = self.engine.open(&mut caller, &open).expect("it is listed");
            let all = PageRange { start: PageIndex::new(0), count: granted.pages };
            let unpinned = self.engine.unpin(&caller, &session, [RangeEntry(all)].into_iter());
            assert!(unpinned.is_ok(), "{unpinned:?}");
            // Nobody else is there who could believe anything.
            assert!(self.engine.disconnect(&session).is_ok());
            let deleted = self.engine.delete(&caller, &session, Delete { keeps_copies: true });
            assert!(deleted.is_ok(), "{deleted:?}");
            self.engine.leave(&mut caller, self.now);
        }
        let stat = self.engine.stat();
        let held =
            [stat.sessions, stat.regions, stat.pages, stat.pinned_pages, stat.reserved_bytes];
        assert_eq!(held, [0; 5]);
        assert!(self.has_assigned || stat.slots == 0, "{} slots are lost", stat.slots);
    }
}

impl Seat {
    /// A message that a client might send, with its checksums right, or not quite.
    fn message(&self, kind: u8, action: u8, script: &mut Script<'_>) -> Option<Vec<u8>> {
        let action = Action::from_number(action);
        let spoilt = script.byte()?;
        let mut bytes = vec![0; HEADER_BYTES];
        let mut header = Header { action, request: spoilt.into(), ..self.session };
        header.entries = u32::from(script.byte()? & 7);
        let is_ranges = matches!(
            action,
            Action::Free
                | Action::Initialise
                | Action::Unpin
                | Action::Pin
                | Action::Prefetch
                | Action::Invalidate
                | Action::Flush
        );
        let is_parts = matches!(action, Action::ReadParts | Action::WriteParts | Action::FreeParts);
        let mut payload = Vec::new();
        for _ in 0..header.entries {
            let (page, number, fill) = (script.byte()?, script.byte()?, script.byte()?);
            let page = PageIndex::new(page.into());
            if is_ranges {
                let count = PageCount::new(if fill == 255 { u64::MAX } else { number.into() });
                RangeEntry(PageRange { start: page, count }).encode(&mut bytes);
                continue;
            }
            let (version, content) = (Version::new(number.into()), [fill; PAGE_SIZE]);
            if is_parts {
                let (first, count) = (u16::from(fill & 7) * 512, 512 << (fill >> 6 & 1));
                let content = &content[..usize::from(count)];
                let checksum = part_checksum(header.region, page, version, first, content);
                PartEntry { page, version, checksum, first, bytes: count }.encode(&mut bytes);
                payload.extend_from_slice(content);
                continue;
            }
            let checksum = page_checksum(header.region, page, version, &content);
            let checksum = Checksum::new(checksum.get() ^ u64::from(fill == 255));
            PageEntry { page, version, checksum, slot: fill.into() }.encode(&mut bytes);
            payload.extend_from_slice(&content);
        }
        if header.payload_kind() != Payload::Body {
            bytes.extend_from_slice(&payload);
        } else if kind == 1 {
            let count = script.byte()?;
            bytes.extend_from_slice(script.bytes(count));
        } else {
            encode_body(action, script.byte()?, script.byte()?, &mut bytes);
        }
        match spoilt {
            1 => header.session = SessionId::new(header.session.get() ^ 1),
            2 => header.region = RegionId::new(header.region.get() ^ 1),
            3 => header.epoch = farmem_region::Epoch::new(header.epoch.get() ^ 1),
            4 => header.incarnation = farmem_region::Incarnation::new(0),
            5 => header.token ^= 1,
            6 => header.version = 7,
            _ => {}
        }
        // As a client would seal it, whatever it carries.
        let entries = header.entries;
        seal_any(Header { entries, ..header }, &mut bytes);
        Some(bytes)
    }

    /// Takes whole messages from what the server has sent.
    fn read_replies(&mut self) {
        let mut line = lock(&self.line);
        let mut at = 0;
        while let Some(head) = line.from_server[at..].first_chunk::<HEADER_BYTES>() {
            let header = Header::decode(head).expect("a header");
            assert!(header.reply, "{header:?}");
            let Some(message) = line.from_server.get(at..at + header.message_bytes()) else {
                break;
            };
            let rest = &message[HEADER_BYTES..];
            verify_body(&header, &rest[..header.covered_bytes()]).expect("a body");
            let (entries, payload) = rest.split_at(header.entry_bytes());
            if header.refusal.is_none() {
                match header.action {
                    Action::Read => check_pages(&header, entries, payload),
                    Action::ReadParts => check_parts(&header, entries, payload),
                    Action::Setup | Action::Attach | Action::Open => self.session = header,
                    _ => {}
                }
            }
            at += header.message_bytes();
        }
        line.from_server.drain(..at);
    }
}

fn check_pages(header: &Header, entries: &[u8], payload: &[u8]) {
    let (pages, rest) = payload.as_chunks::<PAGE_SIZE>();
    assert!(rest.is_empty() && pages.len() == header.entries as usize);
    for (entry, page) in PageEntry::decode_all(entries).zip(pages) {
        let expected = page_checksum(header.region, entry.page, entry.version, page);
        assert_eq!(entry.checksum, expected, "page {}", entry.page);
    }
}

fn check_parts(header: &Header, entries: &[u8], mut parts: &[u8]) {
    for entry in PartEntry::decode_all(entries) {
        let (part, rest) = parts.split_at(entry.bytes.into());
        let (page, version) = (entry.page, entry.version);
        let expected = part_checksum(header.region, page, version, entry.first, part);
        assert_eq!(entry.checksum, expected, "a part of page {page}");
        parts = rest;
    }
    assert!(parts.is_empty());
}

/// The body of an action, from two numbers.
fn encode_body(action: Action, a: u8, b: u8, out: &mut Vec<u8>) {
    let name = NAMES[usize::from(a) % NAMES.len()];
    let (flag, small) = (b & 1 != 0, u64::from(a));
    match action {
        Action::Hello => {
            Hello { oldest: 1, newest: u16::from(a), share_arena: flag }.encode(out);
        }
        Action::Setup => Setup {
            amount: PageCount::new(small).bytes(),
            accept_partial: flag,
            dynamic: b & 2 != 0,
            name,
            credentials: &[],
        }
        .encode(out),
        Action::Attach => {
            let mode = if flag { AttachMode::TakeOver } else { AttachMode::Join };
            Attach { mode, replaces: small }.encode(out);
        }
        Action::Malloc => {
            let add = PageCount::new(if b == 255 { u64::MAX } else { b.into() });
            Malloc { from: PageCount::new(small), add }.encode(out);
        }
        Action::Slots => Slots { wanted: a.into() }.encode(out),
        Action::Create => {
            let page_bytes = PAGE_SIZES[usize::from(a >> 2) % PAGE_SIZES.len()];
            let size = u64::from(page_bytes).max(PAGE_SIZE as u64) * u64::from(b);
            let source = match a >> 5 {
                0 | 1 => Source::Nothing,
                2 => Source::File { path: "/dev/null", offset: 0 },
                _ => Source::Fill(b),
            };
            let size = ByteCount::new(if a == 255 { !0 << 21 } else { size });
            Create { name, size, page_bytes, source, prefers: None }.encode(out);
        }
        Action::Open => Open { take_over: flag, name }.encode(out),
        Action::Clone | Action::Snapshot => {
            let path = if b & 4 != 0 { "/dev/null" } else { "" };
            let range = (b & 2 != 0).then_some(FileRange { path, offset: small });
            Copy { on_access: flag, name, range }.encode(out);
        }
        Action::List => List { after: RegionId::new(small) }.encode(out),
        Action::Map => {
            AskMap { from: PageIndex::new(small), since: b.into(), leases: !flag, news: flag }
                .encode(out);
        }
        Action::Backup | Action::Restore => {
            BackupPlace { flag, name, path: "/dev/null/backup" }.encode(out);
        }
        _ => {}
    }
}

/// As [`seal`]; but what no client may send stays as it is, with its lengths filled in.
fn seal_any(header: Header, bytes: &mut [u8]) {
    let payload = bytes.len() - HEADER_BYTES - header.entry_bytes();
    let header = Header { payload: u32::try_from(payload).expect("small"), ..header };
    let covered = header.covered_bytes().min(bytes.len() - HEADER_BYTES);
    let body_crc = crc32c(&bytes[HEADER_BYTES..HEADER_BYTES + covered]);
    let header = Header { body_crc, reply: false, refusal: None, ..header };
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
}

fn lock(line: &Mutex<Line>) -> std::sync::MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a target on all its seeds.
    fn run(target: &str, run: fn(&[u8]), least: usize) {
        let seeds = format!("{}/../../fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            run(&std::fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= least, "{count} seeds of {target}");
    }

    #[test]
    fn the_seeds_of_peers_leave_nothing_behind() {
        run("peer", peer, 50);
    }

    #[test]
    fn the_seeds_of_files_and_requests_are_read_or_refused() {
        run("backup_table", backup_table, 5);
        run("journal", journal, 20);
        run("http_request", http_request, 5);
    }
}
