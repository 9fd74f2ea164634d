//! All that is said of regions outlives the process that knows it: killed, with its journal as it has grown or
//! rewritten, or handing over. Random requests, then all that is known before and after is compared.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use farmem_region::{ByteCount, Nanos, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};
use farmem_transport::Passage;
use farmem_wire::{
    Action, Attach, AttachMode, Copy, Create, Delete, FileRange, Free, Header, Malloc, Open,
    PAGE_SIZES, PageEntry, Prefer, RangeEntry, RefusalCode, Resize, Setup, Source, Tier,
    page_checksum,
};

use super::supply::Purpose;
use super::{Bring, Caller, Engine, Refusal, lock};
use crate::config::{FileTierConfig, ServerConfig};
use crate::handover::{self, Handed, Parts};
use crate::journal::{self, Record};
use crate::leases::Leases;
use crate::session::Session;

/// Pages of the largest region: some leaves.
const PAGES: u64 = 1300;
/// Ranges of the file, each as long as the largest region.
const RANGES: u64 = 4;
/// Regions and sessions at a time.
const REGIONS_MAX: usize = 7;

/// What is known of each session, and the sums of the server.
type Known = BTreeMap<String, Vec<String>>;

struct Rig {
    place: tempfile::TempDir,
    config: ServerConfig,
    engine: Engine,
    random: u64,
    made: u64,
    version: u64,
    /// Whether who changes a region is its only writer from then on.
    takes_over: bool,
}

fn range(start: u64, count: u64) -> PageRange {
    PageRange { start: PageIndex::new(start), count: PageCount::new(count) }
}

impl Rig {
    fn new(seed: u64) -> Self {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().canonicalize().unwrap();
        let file = fs::File::create(directory.join("file")).unwrap();
        file.set_len(RANGES * PAGES * PAGE_SIZE as u64).unwrap();
        let mut config = ServerConfig::new(Vec::new(), PageCount::new(2048).bytes());
        config.data = Some(directory.join("data"));
        config.tiers.compressed = PageCount::new(4096).bytes();
        let size = PageCount::new(4096).bytes();
        config.tiers.file = Some(FileTierConfig { directory: directory.clone(), size });
        config.directories = vec![directory];
        config.promise_percent = 10_000;
        config.limits.inflight_bytes = PageCount::new(512).bytes();
        let engine = Engine::new(config.clone()).unwrap();
        let random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        Self { place, config, engine, random, made: 0, version: 0, takes_over: true }
    }

    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().canonicalize().unwrap().join(name)
    }

    /// What is known, but for what nobody is promised.
    fn known(&self) -> Known {
        let sessions = self.engine.sessions();
        let mut known = Known::new();
        for shared in sessions.by_id.values() {
            let session = lock(shared);
            // Whoever adds a field decides here whether it outlives the process.
            let Session { id, token, name, granted, dynamic, region, is_resident, .. } = &*session;
            let Session { traffic: _, attached: _, leases: _, orphaned_since: _, .. } = &*session;
            let Session { assigned: _, ended, is_temporary, .. } = &*session;
            assert!(!ended && !is_temporary);
            let is_there = |id: &u64| sessions.by_id.keys().any(|other| other.get() == *id);
            let parent = region.parent().map(|parent| parent.get()).filter(is_there);
            let mut lines = region.lasting();
            lines.push(format!("{token}, {granted:?}, {dynamic}, {is_resident}, of {parent:?}"));
            known.insert(format!("{id:?} {name}"), lines);
        }
        let names: BTreeMap<_, _> = sessions.names.iter().collect();
        let next = sessions.next;
        known.insert("names".to_owned(), vec![format!("{names:?}, next {next}")]);
        drop(sessions);
        let stat = self.engine.stat();
        let sums = [stat.pages, stat.pinned_pages, stat.reserved_bytes, stat.regions];
        known.insert("sums".to_owned(), vec![format!("{sums:?}")]);
        known
    }

    /// Another process goes on, to which nobody is attached, and in which no lease is believed.
    fn go_on(&mut self, engine: Engine) {
        self.engine = engine;
        for shared in self.engine.sessions().by_id.values() {
            lock(shared).leases = Leases::default();
        }
    }

    /// The process is killed, and another one goes on.
    fn kill(&mut self) {
        self.end_process();
        self.go_on(Engine::new(self.config.clone()).unwrap());
    }

    /// Nothing is done any more.
    fn end_process(&mut self) {
        let nobody = Engine::new(ServerConfig::new(Vec::new(), ByteCount::new(4096))).unwrap();
        drop(std::mem::replace(&mut self.engine, nobody));
    }

    fn hand_over(&mut self) {
        let successor = self.successor();
        self.go_on(successor);
    }

    /// What goes on with all that is known, and has put its journal in place.
    fn successor(&self) -> Engine {
        let (ours, theirs) = Passage::pair().unwrap();
        std::thread::scope(|scope| {
            let engine = &self.engine;
            let giver = scope.spawn(move || {
                handover::greet(&ours).unwrap();
                let (given, records) = engine.told(false);
                let parts = Parts {
                    arena: engine.arena.descriptor(),
                    records,
                    file: engine.file_descriptor(),
                    lock: engine.lock_descriptor(),
                    metrics: None,
                    listeners: Vec::new(),
                };
                handover::give(&ours, &given, parts).unwrap();
            });
            let mut handed = Handed::receive(theirs).unwrap();
            let successor = Engine::take_over(self.config.clone(), &mut handed).unwrap();
            handed.ready().unwrap();
            successor.put_journal().unwrap();
            handed.taken();
            giver.join().unwrap();
            successor
        })
    }

    /// Whatever happens to the process, all of it is known afterwards.
    fn end_and_compare(&mut self) {
        let before = self.known();
        let how = self.next(4);
        match how {
            0 => self.hand_over(),
            1 => {
                self.engine.rewrite_journal().unwrap();
                self.kill();
            }
            _ => self.kill(),
        }
        let how = ["handed over", "rewritten", "killed", "killed"][how as usize];
        compare(&before, &self.known(), how);
    }

    /// The names and ids of all regions and sessions.
    fn all(&self) -> Vec<(Header, Option<String>)> {
        let sessions = self.engine.sessions();
        let all = sessions.by_id.values().map(|shared| {
            let session = lock(shared);
            let (header, _) = self.engine.describe(&session);
            (header, session.is_resident.then(|| session.name.clone()))
        });
        all.collect()
    }

    /// Does something as a client of a session.
    fn at<T>(
        &self,
        (header, name): &(Header, Option<String>),
        take_over: bool,
        act: impl FnOnce(&Engine, &Caller, &Header) -> T,
    ) -> T {
        let mut caller = self.engine.caller();
        caller.may_wait = true;
        let attached = match name {
            Some(name) => self.engine.open(&mut caller, &Open { take_over, name }),
            None => {
                let mode = if take_over { AttachMode::TakeOver } else { AttachMode::Join };
                let attach = Attach { mode, replaces: 0 };
                self.engine.attach(&mut caller, header, &attach)
            }
        };
        let (header, _) = attached.unwrap();
        if let Some((_, shared)) = caller.session.as_ref().filter(|_| !take_over) {
            // Whoever changed it before is not its only writer.
            lock(shared).leases = Leases::default();
        }
        let done = act(&self.engine, &caller, &Header { entries: 1, ..header });
        self.engine.leave(&mut caller, Nanos::new(1));
        done
    }

    fn create(&mut self) -> Result<(), Refusal> {
        self.made += 1;
        let name = format!("r{}", self.made);
        let page_bytes = PAGE_SIZES[self.next(PAGE_SIZES.len() as u64 - 1) as usize];
        let unit = (u64::from(page_bytes) / PAGE_SIZE as u64).max(1);
        let pages = (1 + self.next(PAGES)).div_ceil(unit) * unit;
        let size = PageCount::new(pages.min(PAGES / unit * unit)).bytes();
        let (path, offset) = (self.path("file"), self.offset());
        let source = match self.next(4) {
            0 => Source::Nothing,
            1 => Source::Fill(7),
            _ => Source::File { path: path.to_str().unwrap(), offset },
        };
        let prefers = self.tier();
        let create = Create { name: &name, size, page_bytes, source, prefers };
        self.engine.create(&create).map(|_| ())
    }

    fn tier(&mut self) -> Option<Tier> {
        let tiers = [None, Some(Tier::Dram), Some(Tier::Compressed), Some(Tier::File)];
        tiers[self.next(4) as usize]
    }

    fn offset(&mut self) -> u64 {
        self.next(RANGES) * PAGES * PAGE_SIZE as u64 / (64 << 10) * (64 << 10)
    }

    fn copy(&mut self, of: &(Header, Option<String>)) -> Result<(), Refusal> {
        self.made += 1;
        let name = format!("c{}", self.made);
        let offset = self.offset();
        let is_frozen = self.next(4) == 0;
        let has_range = !is_frozen && self.next(2) == 0;
        let range = has_range.then_some(FileRange { path: "", offset });
        let copy = Copy { on_access: self.next(2) == 0, name: &name, range };
        self.at(of, false, |engine, caller, header| {
            engine.copy_region(caller, header, &copy, is_frozen).map(|_| ())
        })
    }

    /// A session, or one that begins as a copy of another one's.
    fn set_up(&mut self, of: Option<&(Header, Option<String>)>) -> Result<(), Refusal> {
        let pages = PageCount::new(1 + self.next(PAGES));
        let (accept_partial, dynamic) = (false, self.next(2) == 0);
        let amount = pages.bytes();
        let setup = Setup { amount, accept_partial, dynamic, name: "session", credentials: &[] };
        let mut caller = self.engine.caller();
        let header = of.map_or(Header::request(Action::Setup, 0), |(header, _)| *header);
        let (header, _) = self.engine.setup(&mut caller, &header, &setup)?;
        let malloc = Malloc { from: PageCount::new(0), add: pages };
        let grown = self.engine.malloc(&caller, &header, &malloc);
        self.engine.leave(&mut caller, Nanos::new(1));
        grown.map(|_| ())
    }

    fn write(&mut self, to: &(Header, Option<String>), pages: PageRange) -> Result<(), Refusal> {
        self.version += 1;
        let version = Version::new(self.version);
        let byte = (self.version % 255) as u8;
        self.at(to, self.takes_over, |engine, caller, header| {
            let entry = |page| {
                let page = PageIndex::new(page);
                let content = [byte; PAGE_SIZE];
                let checksum = page_checksum(header.region, page, version, &content);
                PageEntry { page, version, checksum, slot: 0 }
            };
            let count = pages.count.get().min(16);
            let entries: Vec<_> =
                (pages.start.get()..pages.start.get() + count).map(entry).collect();
            let header = Header { entries: count as u32, ..*header };
            let (mut slots, mut unused) = (Vec::new(), Vec::new());
            engine.begin_write(caller, &header, entries.iter().copied(), &mut slots)?;
            for slot in &mut slots {
                engine.arena.bytes_mut(slot).fill(byte);
            }
            engine.commit_write(caller, &header, &entries, &mut slots, &mut unused, |_| ())
        })
    }

    fn read(&self, from: &(Header, Option<String>), pages: PageRange) -> Result<(), Refusal> {
        self.at(from, false, |engine, caller, header| {
            let header = Header { action: Action::Read, ..*header };
            let pages = pages.start.get()..pages.start.get() + pages.count.get().min(8);
            let entries =
                pages.map(|page| PageEntry { page: PageIndex::new(page), ..PageEntry::default() });
            let mut slots = Vec::new();
            let read = engine.read(caller, &header, entries, &mut slots, |_| ());
            engine.arena.release(slots);
            read
        })
    }

    /// A range of whole pages of a region's page size.
    fn some(&mut self, of: &(Header, Option<String>)) -> PageRange {
        let (pages, unit) = self.at(of, false, |engine, caller, header| {
            let session = engine.enter(caller, header).unwrap();
            (session.region.pages.get(), session.region.unit_pages())
        });
        let start = self.next(pages.max(1)) / unit * unit;
        let most = if self.next(4) == 0 { pages.max(1) } else { 40 };
        let count = (1 + self.next(most)).div_ceil(unit) * unit;
        range(start, count.min(pages - start))
    }

    /// One request, which may be refused.
    fn step(&mut self) -> Result<(), Refusal> {
        let all = self.all();
        self.takes_over = self.next(4) == 0;
        if all.is_empty() || (all.len() < REGIONS_MAX && self.next(12) == 0) {
            return if self.next(4) == 0 { self.set_up(None) } else { self.create() };
        }
        let at = &all[self.next(all.len() as u64) as usize];
        let (what, tier, dice) = (self.next(100), self.tier(), self.next(3));
        let some = self.some(at);
        // Single pages of 4 KiB are freed.
        let within = self.next(some.count.get().max(1));
        let freed = range(some.start.get() + within, some.count.get() - within);
        let ranges = || std::iter::once(RangeEntry(some));
        match what {
            0..8 if all.len() < REGIONS_MAX && at.1.is_some() => self.copy(at),
            0..8 if all.len() < REGIONS_MAX => self.set_up(Some(at)),
            8..12 => self.change(at, |engine, caller, header| {
                let size = PageCount::new(some.start.get().max(some.count.get())).bytes();
                engine.resize(caller, header, &Resize { size }).map(|_| ())
            }),
            12..24 => self.change(at, |engine, caller, header| {
                engine.prefer(caller, header, ranges(), &Prefer { tier }).map(|_| ())
            }),
            24..34 => self.change(at, |engine, caller, header| {
                let mut slots = Vec::new();
                let header = Header { action: Action::Free, ..*header };
                let (freed, free) =
                    (std::iter::once(RangeEntry(freed)), Free { also_pinned: dice > 1 });
                let freed = engine.free(caller, &header, freed, free, &mut slots);
                engine.arena.release(slots);
                freed.map(|_| ())
            }),
            34..38 => self.change(at, |engine, caller, header| {
                let how = [Bring::Pin, Bring::Prefetch, Bring::Initialise][dice as usize];
                engine.bring(caller, header, ranges(), how).map(|_| ())
            }),
            38..42 => self.change(at, |engine, caller, header| {
                engine.unpin(caller, header, ranges()).map(|_| ())
            }),
            42..50 => self.change(at, |engine, caller, header| {
                engine.flush(caller, header, ranges()).map(|_| ())
            }),
            50..53 if all.len() > 2 => self.delete(at, dice > 0),
            53..56 => {
                self.engine.demote(some.count.get() as usize);
                Ok(())
            }
            56..66 => self.read(at, some),
            66..68 => self.back_up_and_restore(at),
            _ => self.write(at, some),
        }
    }

    fn change(
        &self,
        at: &(Header, Option<String>),
        act: impl FnOnce(&Engine, &Caller, &Header) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        self.at(at, self.takes_over, act)
    }

    fn delete(&self, at: &(Header, Option<String>), keeps_copies: bool) -> Result<(), Refusal> {
        if at.1.is_none() {
            return self.engine.disconnect(&at.0);
        }
        self.change(at, |engine, caller, header| {
            engine.delete(caller, header, Delete { keeps_copies })
        })
    }

    /// The region that is restored replaces the one that was backed up.
    fn back_up_and_restore(&self, at: &(Header, Option<String>)) -> Result<(), Refusal> {
        let Some(name) = &at.1 else { return Ok(()) };
        let path = self.path("backup");
        let path = path.to_str().unwrap();
        self.at(at, false, |engine, caller, header| {
            let header = Header { action: Action::Backup, ..*header };
            engine.back_up(caller, &header, path, true)
        })?;
        self.engine.restore(path, name, true).map(|_| ())
    }

    fn journal(&self) -> Vec<u8> {
        fs::read(self.path("data/journal")).unwrap()
    }

    fn delete_all(&mut self) {
        for at in self.all() {
            if at.1.is_some() {
                let pages = self.at(&at, false, |engine, caller, header| {
                    engine.enter(caller, header).unwrap().region.pages
                });
                let all = range(0, pages.get());
                self.change(&at, |engine, caller, header| {
                    let ranges = std::iter::once(RangeEntry(all));
                    engine.unpin(caller, header, ranges).map(|_| ())
                })
                .unwrap();
            }
            self.delete(&at, true).unwrap();
        }
    }

    fn check_empty(&self) {
        let stat = self.engine.stat();
        let left = [stat.slots, stat.pages, stat.pinned_pages, stat.reserved_bytes];
        assert_eq!(left, [0; 4], "nothing is left");
        assert_eq!((stat.table_bytes, stat.file_bytes, stat.compressed_pages), (0, 0, 0));
    }
}

fn compare(before: &Known, after: &Known, how: &str) {
    let names = |known: &Known| known.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(after), "{how}");
    for (name, lines) in before {
        for (one, other) in lines.iter().zip(&after[name]) {
            assert_eq!(one, other, "{how}: {name}");
        }
        assert_eq!(lines.len(), after[name].len(), "{how}: {name}");
    }
}

#[test]
fn cap_95_all_that_is_said_of_regions_outlives_the_process() {
    let mut refused = BTreeMap::new();
    for seed in 1..=6 {
        let mut rig = Rig::new(seed);
        for step in 1..=400 {
            if let Err(refusal) = rig.step() {
                *refused.entry(format!("{:?}", refusal.code)).or_insert(0) += 1;
            }
            if step % 25 == 0 {
                rig.end_and_compare();
            }
        }
        rig.delete_all();
        rig.check_empty();
    }
    eprintln!("refused of 2400 requests: {refused:?}");
}

/// The journal as it was after each record from `from` on: what a process that is killed there leaves.
fn cuts(journal: &[u8], from: usize) -> Vec<usize> {
    let mut cuts = vec![from];
    let mut at = from;
    while let Ok((_, bytes)) = Record::decode(&journal[at..]) {
        at += bytes;
        cuts.push(at);
    }
    cuts
}

impl Rig {
    /// Where the journal ends.
    fn end_of_journal(&self) -> usize {
        *cuts(&self.journal(), journal::offset(0)).last().unwrap()
    }

    /// As [`Rig::known`], but for how often it was copied and what was read.
    fn known_roughly(&self) -> Known {
        let mut known = self.known();
        known.remove("names");
        for lines in known.values_mut() {
            lines.retain(|line| !line.starts_with("working set"));
            for line in lines {
                if line.starts_with("generation") {
                    line.clear();
                }
            }
        }
        known
    }

    /// Makes a request, with the process killed after each record that it notes: afterwards it was
    /// made, or it was not. What is mended then stays so, and nothing comes back that was deleted.
    fn crash_in(&mut self, what: &str, act: impl FnOnce(&mut Self)) {
        let (before, from) = (self.known_roughly(), self.end_of_journal());
        act(self);
        let after = self.known_roughly();
        assert_ne!(before, after, "{what}");
        let whole = self.journal();
        let cuts = cuts(&whole, from);
        assert!(cuts.len() > 1, "{what} is noted");
        let path = self.path("data/journal");
        for (records, cut) in cuts.iter().enumerate() {
            if records > 8 && cuts.len() - records > 12 && records % 100 > 0 {
                // A page each.
                continue;
            }
            let how = format!("{what}, killed after {records} of {} records", cuts.len() - 1);
            self.end_process();
            fs::write(&path, &whole[..*cut]).unwrap();
            self.go_on(Engine::new(self.config.clone()).unwrap());
            let known = self.known_roughly();
            let is_made = *cut == whole_end(&cuts);
            if is_made || known != before {
                compare(&after, &known, &how);
            }
            self.kill();
            compare(&known, &self.known_roughly(), &format!("{how}, and again"));
            self.delete_all();
            self.kill();
            assert_eq!(self.all(), [], "{how}, and deleted");
            self.check_empty();
        }
        self.end_process();
        fs::write(&path, &whole[..whole_end(&cuts)]).unwrap();
        self.go_on(Engine::new(self.config.clone()).unwrap());
    }

    fn named(&self, name: &str) -> (Header, Option<String>) {
        self.all().into_iter().find(|(_, other)| other.as_deref() == Some(name)).unwrap()
    }

    fn crash_in_resize(&mut self, name: &str, pages: u64) {
        let what = format!("resize {name} to {pages}");
        self.crash_in(&what, |rig| {
            let at = rig.named(name);
            let resize = Resize { size: PageCount::new(pages).bytes() };
            let done = rig.change(&at, |engine, caller, header| {
                engine.resize(caller, header, &resize).map(|_| ())
            });
            done.unwrap();
        });
    }

    fn crash_in_copy(&mut self, of: &str, name: &str, range: Option<u64>) {
        let range = range.map(|range| FileRange { path: "", offset: range * (4 << 20) });
        let copy = Copy { on_access: false, name, range };
        self.crash_in(&format!("copy {of} as {name}"), |rig| {
            let at = rig.named(of);
            rig.at(&at, false, |engine, caller, header| {
                engine.copy_region(caller, header, &copy, name == "frozen").unwrap();
            });
        });
    }
}

fn whole_end(cuts: &[usize]) -> usize {
    *cuts.last().unwrap()
}

#[test]
fn cap_95_what_a_server_was_killed_in_was_done_or_was_not() {
    let mut rig = Rig::new(1);
    rig.takes_over = false;
    // Blocks of 4 MiB, so that regions have several.
    rig.config.widths = farmem_region::AddressWidths::new(16, 26, 22).unwrap();
    rig.kill();
    let file = rig.path("file");
    let source = Source::File { path: file.to_str().unwrap(), offset: 0 };
    let size = PageCount::new(1024).bytes();
    for (name, source) in [("file", source), ("fill", Source::Fill(7))] {
        let create = Create { name, size, page_bytes: 4096, source, prefers: Some(Tier::File) };
        rig.crash_in(&format!("create {name}"), |rig| {
            rig.engine.create(&create).unwrap();
        });
        let at = rig.named(name);
        for start in (0..1024).step_by(100) {
            rig.write(&at, range(start, 8)).unwrap();
        }
        rig.read(&at, range(1000, 8)).unwrap();
    }
    rig.crash_in_copy("file", "copy", None);
    rig.crash_in_copy("file", "frozen", None);
    rig.crash_in_copy("file", "own", Some(1));
    for name in ["copy", "fill", "own", "file"] {
        rig.crash_in_resize(name, 700);
    }
    rig.crash_in_resize("copy", 1020);
    rig.crash_in_resize("fill", 2100);
    for name in ["file", "own"] {
        let flush = |rig: &mut Rig| {
            let at = rig.named(name);
            let ranges = std::iter::once(RangeEntry(range(0, 1)));
            rig.at(&at, false, |engine, caller, header| {
                engine.flush(caller, header, ranges).unwrap();
            });
        };
        if name == "own" {
            // But for that it is complete.
            let at = rig.named(name);
            let all = range(0, 700);
            rig.at(&at, false, |engine, caller, header| {
                let mut session = engine.enter(caller, header).unwrap();
                session.region.own.as_mut().unwrap().held.insert(all);
            });
        }
        rig.crash_in(&format!("flush {name}"), flush);
    }
    for name in ["fill", "copy"] {
        let at = rig.named(name);
        rig.crash_in(&format!("restore {name}"), |rig| rig.back_up_and_restore(&at).unwrap());
    }
    for name in ["file", "own", "fill"] {
        let at = rig.named(name);
        rig.crash_in(&format!("delete {name}"), |rig| rig.delete(&at, true).unwrap());
    }
}

/// Whoever stops a server does not wait for a backup.
#[test]
fn cap_74_a_backup_in_which_the_server_ends_leaves_the_former_one() {
    let mut rig = Rig::new(1);
    let (size, source) = (PageCount::new(64).bytes(), Source::Fill(0));
    let create = Create { name: "r", size, page_bytes: 4096, source, prefers: None };
    rig.engine.create(&create).unwrap();
    rig.write(&rig.named("r"), range(3, 1)).unwrap();
    rig.back_up_and_restore(&rig.named("r")).unwrap();
    rig.write(&rig.named("r"), range(4, 1)).unwrap();
    let path = rig.path("backup");
    let files = || -> BTreeMap<PathBuf, Vec<u8>> {
        let files = fs::read_dir(&path).unwrap().map(|file| file.unwrap().path());
        files.map(|file| (file.clone(), fs::read(file).unwrap())).collect()
    };
    let (before, known) = (files(), rig.known());
    rig.engine.stop_keeping();
    let refused = rig.back_up_and_restore(&rig.named("r")).unwrap_err();
    assert_eq!(refused.code, RefusalCode::Busy);
    let refused = rig.engine.restore(path.to_str().unwrap(), "other", false).unwrap_err();
    assert_eq!(refused.code, RefusalCode::Busy);
    assert_eq!(files(), before);
    rig.engine.keep_again();
    assert_eq!(rig.known()["sums"], known["sums"]);
    rig.back_up_and_restore(&rig.named("r")).unwrap();
}

/// A copy is kept where its original was to be kept, and both change apart.
#[test]
fn cap_14_a_copy_keeps_its_preference_though_the_server_is_killed() {
    let mut rig = Rig::new(1);
    let (size, source) = (PageCount::new(64).bytes(), Source::Fill(0));
    let prefers = Some(Tier::File);
    let create = Create { name: "r", size, page_bytes: 4096, source, prefers };
    rig.engine.create(&create).unwrap();
    let region = rig.all().remove(0);
    let copy = Copy { on_access: false, name: "copy", range: None };
    for (name, is_frozen) in [("copy", false), ("frozen", true)] {
        rig.at(&region, false, |engine, caller, header| {
            engine.copy_region(caller, header, &Copy { name, ..copy }, is_frozen).unwrap();
        });
    }
    let prefer = |rig: &Rig, at: &(Header, Option<String>), start, tier| {
        rig.change(at, |engine, caller, header| {
            let ranges = std::iter::once(RangeEntry(range(start, 4)));
            engine.prefer(caller, header, ranges, &Prefer { tier }).map(|_| ())
        })
        .unwrap();
    };
    let copy = rig.all().remove(1);
    prefer(&rig, &copy, 8, Some(Tier::Dram));
    prefer(&rig, &region, 16, None);
    let before = rig.known();
    rig.kill();
    compare(&before, &rig.known(), "killed");
    for at in rig.all() {
        let prefers = rig.at(&at, false, |engine, caller, header| {
            engine.enter(caller, header).unwrap().region.prefers.pages()
        });
        let expected = match at.1.as_deref() {
            Some("r") => [0, 0, 60],
            Some("copy") => [4, 0, 60],
            _ => [0, 0, 64],
        };
        assert_eq!(prefers, expected.map(PageCount::new), "{:?}", at.1);
    }
}

/// Journals before version 5 do not say which file a region is made from. One of its copies that is not written
/// again by anybody must know it after the next restart too.
#[test]
fn cap_95_copies_stay_as_they_are_though_the_journal_is_older_than_which_files_there_are() {
    let mut rig = Rig::new(1);
    let path = rig.path("file");
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let size = PageCount::new(64).bytes();
    let create = Create { name: "file", size, page_bytes: 4096, source, prefers: None };
    rig.engine.create(&create).unwrap();
    let copy = Copy { on_access: false, name: "copy", range: None };
    rig.at(&rig.named("file"), false, |engine, caller, header| {
        engine.copy_region(caller, header, &copy, false).unwrap();
    });
    rig.engine.forget_which_files();
    rig.kill();
    let file = rig.named("file");
    rig.at(&file, true, |_, _, _| ());
    rig.kill();
    rig.write(&rig.named("file"), range(3, 1)).unwrap();
    rig.at(&rig.named("file"), false, |engine, caller, header| {
        let ranges = std::iter::once(RangeEntry(range(0, 64)));
        assert_eq!(engine.flush(caller, header, ranges).unwrap().changed.get(), 1);
    });
    assert_ne!(fs::read(&path).unwrap()[3 * PAGE_SIZE], 0);
    rig.read(&rig.named("copy"), range(3, 1)).unwrap();
    let byte = rig.at(&rig.named("copy"), false, |engine, caller, header| {
        let header = Header { action: Action::Read, ..*header };
        let wanted = PageEntry { page: PageIndex::new(3), ..PageEntry::default() };
        let mut slots = Vec::new();
        engine.read(caller, &header, std::iter::once(wanted), &mut slots, |_| ()).unwrap();
        let byte = engine.arena.bytes(&slots[0])[0];
        engine.arena.release(slots);
        byte
    });
    assert_eq!(byte, 0, "as it was when the copy was made");
    rig.end_process();
    // Another file in its place is none of theirs.
    fs::rename(&path, rig.path("former")).unwrap();
    fs::write(&path, vec![7; (PAGES * PAGE_SIZE as u64) as usize]).unwrap();
    rig.go_on(Engine::new(rig.config.clone()).unwrap());
    let read = rig.read(&rig.named("copy"), range(5, 1));
    assert_eq!(read.map_err(|refusal| refusal.code), Err(RefusalCode::FileFailed));
}

/// What takes a region's pages on is refused where hardly anything more can be noted, as a write is; and nothing
/// is noted that need not be.
#[test]
fn cap_95_nothing_is_taken_on_where_the_journal_has_no_room() {
    let mut rig = Rig::new(1);
    let file = rig.path("file");
    let source = Source::File { path: file.to_str().unwrap(), offset: 0 };
    let size = PageCount::new(1024).bytes();
    let create = Create { name: "file", size, page_bytes: 4096, source, prefers: None };
    rig.engine.create(&create).unwrap();
    let at = rig.named("file");
    for start in (0..1024).step_by(8) {
        rig.write(&at, range(start, 4)).unwrap();
    }
    rig.back_up_and_restore(&at).unwrap();
    let at = rig.named("file");
    let create = Create { name: "other", ..create };
    let other = Source::File { path: file.to_str().unwrap(), offset: PAGES * PAGE_SIZE as u64 };
    rig.engine.create(&Create { source: other, ..create }).unwrap();
    let other = rig.named("other");
    let journal = |rig: &Rig| rig.engine.tiers.journal().unwrap().len();
    let seems_short = |rig: &Rig, is_short| {
        let journal = rig.engine.tiers.journal().unwrap();
        journal.seems_short.store(is_short, std::sync::atomic::Ordering::Relaxed);
    };
    seems_short(&rig, true);
    let busy = Err(RefusalCode::Busy);
    for how in [Bring::Initialise, Bring::Prefetch, Bring::Pin] {
        let brought = rig.at(&other, false, |engine, caller, header| {
            let ranges = std::iter::once(RangeEntry(range(0, 8)));
            engine.bring(caller, header, ranges, how).map(|_| ()).map_err(|refusal| refusal.code)
        });
        assert_eq!(brought, busy, "{how:?}");
    }
    assert_eq!(rig.read(&other, range(0, 8)).map_err(|refusal| refusal.code), busy);
    assert_eq!(rig.write(&at, range(0, 8)).map_err(|refusal| refusal.code), busy);
    assert_eq!(rig.back_up_and_restore(&at).map_err(|refusal| refusal.code), busy);
    let before = journal(&rig);
    rig.engine.demote(100);
    assert_eq!(journal(&rig), before);
    seems_short(&rig, false);
    rig.read(&other, range(0, 8)).unwrap();
    assert!(rig.engine.demote(100) > 0 && journal(&rig) > before);
}

/// Pages that stay in memory as no move can be noted go where they are to be kept once moves can be.
#[test]
fn cap_95_the_keeper_goes_on_once_the_journal_is_mended() {
    let mut rig = Rig::new(1);
    let (size, source) = (PageCount::new(64).bytes(), Source::Fill(0));
    let prefers = Some(Tier::Compressed);
    let create = Create { name: "region", size, page_bytes: 4096, source, prefers };
    rig.engine.create(&create).unwrap();
    let at = rig.named("region");
    rig.write(&at, range(0, 16)).unwrap();
    let (engine, pause) = (&rig.engine, std::time::Duration::from_millis(50));
    let journal = engine.tiers.journal().unwrap();
    journal.seems_short.store(true, std::sync::atomic::Ordering::Relaxed);
    engine.keep_again();
    let moved = std::thread::scope(|scope| {
        scope.spawn(|| engine.keep_room());
        std::thread::sleep(pause * 6);
        engine.go_on_moving();
        let before = engine.tiers.usage().compressed_pages;
        journal.seems_short.store(false, std::sync::atomic::Ordering::Relaxed);
        let moved = (0..200).any(|_| {
            engine.go_on_moving();
            std::thread::sleep(pause);
            engine.tiers.usage().compressed_pages == 16
        });
        engine.stop_keeping();
        (before, moved)
    });
    assert_eq!(moved, (0, true));
}

/// Whoever is connected does not wait for a journal that there is no room for.
#[test]
fn cap_95_it_is_looked_for_room_before_everybody_waits_for_a_new_journal() {
    let rig = Rig::new(1);
    let journal = rig.engine.tiers.journal().unwrap();
    journal.seems_full.store(true, std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| {
        let (done, renewed) = std::sync::mpsc::channel();
        let sessions = rig.engine.sessions();
        let engine = &rig.engine;
        scope.spawn(move || done.send(engine.renew_journal().unwrap_err().kind()).unwrap());
        let renewed = renewed.recv_timeout(std::time::Duration::from_secs(10));
        drop(sessions);
        assert_eq!(renewed, Ok(std::io::ErrorKind::StorageFull));
    });
    journal.seems_full.store(false, std::sync::atomic::Ordering::Relaxed);
    assert!(journal.has_room_for(0) && !journal.has_room_for(u64::MAX));
    rig.engine.renew_journal().unwrap();
}

/// Where no page leaves memory because no move can be noted, whoever wants room is told to come again: memory is
/// not full for that, however long it lasts.
#[test]
fn cap_95_memory_is_not_full_because_the_journal_is_short() {
    let rig = Rig::new(1);
    let journal = rig.engine.tiers.journal().unwrap();
    let mut slots = Vec::new();
    let mut fill = |purpose| loop {
        if let Err(refusal) = rig.engine.take_slots(purpose, true, 1, &mut slots) {
            return refusal.code;
        }
    };
    journal.seems_short.store(true, std::sync::atomic::Ordering::Relaxed);
    for purpose in [Purpose::Keep, Purpose::Send] {
        assert_eq!((fill(purpose), fill(purpose)), (RefusalCode::Busy, RefusalCode::Busy));
    }
    journal.seems_short.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(fill(Purpose::Keep), RefusalCode::Full);
    rig.engine.arena.release(slots);
}

/// A successor puts its journal in place and dies. The server goes on, and its disk is full: what it is
/// killed with is not what the successor wrote, and nobody may take that for it. Once the disk has room, and
/// another hand-over has failed, all is noted again.
#[test]
fn cap_95_after_a_failed_hand_over_an_old_journal_is_not_believed() {
    for (full_before, full_after) in [(false, false), (true, true), (true, false)] {
        let mut rig = Rig::new(1);
        let (size, source) = (PageCount::new(64).bytes(), Source::Fill(0));
        let create = |name| Create { name, size, page_bytes: 4096, source, prefers: None };
        let seems_full = |rig: &Rig, is_full| {
            let journal = rig.engine.tiers.journal().unwrap();
            journal.seems_full.store(is_full, std::sync::atomic::Ordering::Relaxed);
        };
        rig.engine.create(&create("first")).unwrap();
        drop(rig.successor());
        seems_full(&rig, full_before);
        assert_eq!(rig.engine.serve_again().is_err(), full_before);
        rig.engine.create(&create("second")).unwrap();
        if full_before && !full_after {
            seems_full(&rig, false);
            // It ended before it had put its journal in place.
            rig.engine.serve_again().unwrap();
        }
        rig.engine.create(&create("third")).unwrap();
        let incarnation = rig.engine.incarnation();
        rig.kill();
        let names: Vec<_> = rig.all().into_iter().filter_map(|(_, name)| name).collect();
        assert_eq!(names, if full_after { vec![] } else { vec!["first", "second", "third"] });
        assert_eq!(rig.engine.incarnation() == incarnation, !full_after);
    }
}
