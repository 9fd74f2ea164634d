//! Random operations on regions that are copied from each other, against plain vectors. The tiers are
//! so small that pages move all the time.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use farmem_region::{ByteCount, PAGE_SIZE, PageCount};
use farmem_wire::{Action, RefusalCode, Source, Tier};

use crate::raw::{Raw, TestServer, patiently};
use crate::tiers::{content, with_file};

/// What regions hold that are made from no file.
const FILL: u8 = 9;

type Page = Arc<[u8; PAGE_SIZE]>;

/// What a page is known to be.
#[derive(Clone)]
struct Known {
    /// In which it was written last, 0 for never.
    version: u64,
    bytes: Page,
}

pub(crate) struct Model<'a> {
    server: &'a TestServer,
    page_bytes: u32,
    regions: Vec<Modelled>,
    random: u64,
    version: u64,
    made: u64,
    /// Where backups may be made.
    pub(crate) backups: Option<PathBuf>,
    /// The file that the first region is made from, and what it holds.
    file: Option<(PathBuf, Vec<Page>)>,
}

struct Modelled {
    name: String,
    client: Raw,
    pages: Vec<Known>,
    pins: Vec<bool>,
    is_frozen: bool,
    /// Whether what was never written, or is forgotten, is as the file has it. Else it is a fill.
    is_made: bool,
    fill: u8,
    /// Whether it is written back to the file.
    writes_back: bool,
}

impl Modelled {
    fn len(&self) -> u64 {
        self.pages.len() as u64
    }
}

impl<'a> Model<'a> {
    /// A region of such a page size; made from a file in a directory if there is one.
    pub(crate) fn new(
        server: &'a TestServer,
        seed: u64,
        page_bytes: u32,
        files: Option<&Path>,
    ) -> Self {
        let random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        let (regions, backups, file) = (Vec::new(), None, None);
        let mut model =
            Self { server, page_bytes, regions, random, version: 0, made: 0, backups, file };
        if let Some(directory) = files {
            let pages: Vec<Page> =
                (0..model.pages()).map(|page| content(page, 1 << 30, true).into()).collect();
            let bytes: Vec<u8> = pages.iter().flat_map(|page| page.iter().copied()).collect();
            let path = directory.canonicalize().unwrap().join("backing");
            std::fs::write(&path, bytes).unwrap();
            model.file = Some((path, pages));
        }
        model.create();
        model
    }

    /// Pages of 4 KiB that are one portion, or part of one.
    fn unit(&self) -> u64 {
        (u64::from(self.page_bytes) / PAGE_SIZE as u64).max(1)
    }

    /// Pages of the region that all begins with.
    fn pages(&self) -> u64 {
        match self.unit() {
            1 => 700,
            16 => 704,
            _ => 1024,
        }
    }

    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn create(&mut self) {
        let name = format!("region {}", self.made);
        self.made += 1;
        let mut admin = Raw::greeted(self.server);
        let source = match &self.file {
            Some((path, _)) => Source::File { path: path.to_str().unwrap(), offset: 0 },
            None => Source::Fill(FILL),
        };
        let count = self.pages();
        admin.create(&name, count * PAGE_SIZE as u64, self.page_bytes, source).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let pins = vec![false; count as usize];
        let (is_made, writes_back) = (self.file.is_some(), self.file.is_some());
        let mut region = Modelled {
            name,
            client,
            pages: Vec::new(),
            pins,
            is_frozen: false,
            is_made,
            fill: FILL,
            writes_back,
        };
        region.pages = (0..count).map(|page| self.unwritten(&region, page)).collect();
        self.regions.push(region);
    }

    /// What a page of a region holds that is forgotten.
    fn unwritten(&self, region: &Modelled, page: u64) -> Known {
        let bytes = match &self.file {
            Some((_, pages)) if region.is_made => Arc::clone(&pages[page as usize]),
            _ => Arc::new([region.fill; PAGE_SIZE]),
        };
        Known { version: 0, bytes }
    }

    fn forget(&mut self, at: usize, pages: std::ops::Range<u64>) {
        for page in pages {
            let known = self.unwritten(&self.regions[at], page);
            self.regions[at].pages[page as usize] = known;
        }
    }

    /// A range widened to whole portions.
    fn whole(&self, start: u64, count: u64) -> (u64, u64) {
        let unit = self.unit();
        let end = (start + count).next_multiple_of(unit);
        let start = start / unit * unit;
        (start, end - start)
    }

    pub(crate) fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        for at in 0..self.regions.len() {
            self.check(at, 0, self.regions[at].len());
            if self.regions[at].writes_back {
                self.flush(at, 0, self.regions[at].len());
            }
        }
        while !self.regions.is_empty() {
            self.delete(0);
        }
        self.server.wait_until_empty();
        let stat = self.server.stat();
        assert_eq!((stat.compressed_pages, stat.file_bytes, stat.pinned_pages), (0, 0, 0));
        assert_eq!(stat.table_bytes, 0);
        // A process that was killed has not counted to its end.
        assert!(stat.demoted_pages > 500 || self.server.process.is_some(), "{stat:?}");
    }

    fn step(&mut self) {
        let at = self.next(self.regions.len() as u64) as usize;
        let pages = self.regions[at].len();
        let start = self.next(pages);
        let count = (1 + self.next(40)).min(pages - start);
        let (first, whole) = self.whole(start, count);
        // As many as there is room for in all tiers together.
        let most = if self.unit() == 512 { 5 } else { 8 };
        match self.next(100) {
            0..20 if self.page_bytes < 4096 => self.write_parts(at),
            20..40 if self.page_bytes < 4096 => self.check_parts(at),
            40..43 if self.page_bytes < 4096 => self.free_part(at),
            0..44 => self.write(at, start, count.min(16)),
            44..45 => self.free(at, start, count),
            45..77 => self.check(at, start, count.min(16)),
            77..80 if self.regions[at].writes_back => self.flush(at, first, whole),
            77..80 => self.check(at, start, count.min(16)),
            80..86 if self.unit() < 512 || self.next(4) == 0 => self.invalidate(at, first, whole),
            86..89 => self.bring(at, Action::Initialise, first, whole),
            89..92 => self.bring(at, Action::Prefetch, first, whole),
            92..93 if self.unit() == 1 => self.pin(at, start, count.min(8)),
            92..93 if self.unit() == 16 => self.pin(at, first, 16),
            93..94 => self.unpin(at),
            94..95 if self.next(2) == 0 => self.resize(at),
            94..95 => self.prefer(at, first, whole),
            95..97 if self.regions.len() < most - 2 => self.copy(at),
            97..98 if self.regions.len() < most => self.back_up(at),
            98..99 if self.regions.len() > 1 => self.delete(at),
            99..100 if self.server.process.is_some() && self.next(2) == 0 => self.kill(at),
            99..100 if self.server.hands_over && self.next(2) == 0 => self.kill(at),
            _ => {}
        }
    }

    /// Ends the server in the midst of writes to a region, and has another one go on. Those that it has
    /// acknowledged must all be there, the others may be.
    fn kill(&mut self, at: usize) {
        let pause = std::time::Duration::from_micros(self.next(1500));
        let pages = self.regions[at].len();
        let writes: Vec<(u64, u64)> = (0..40)
            .map(|_| {
                self.version += 1;
                (self.next(pages - 16), self.version)
            })
            .collect();
        let server = self.server;
        let region = &mut self.regions[at];
        let acknowledged = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                match &server.process {
                    Some(process) => process.lock().unwrap().kill(),
                    None => server.hand_over(),
                }
            });
            let heard = writes.iter().take_while(|(start, version)| {
                let pages: Vec<_> = (*start..start + 16)
                    .map(|page| (page, *version, bytes(page, *version)))
                    .collect();
                !region.is_frozen && region.client.try_write_pages(&pages)
            });
            heard.count()
        });
        if let Some(process) = &server.process {
            process.lock().unwrap().start_again();
        }
        for region in &mut self.regions {
            region.client = Raw::opened(server, &region.name).unwrap();
        }
        let region = &mut self.regions[at];
        if region.is_frozen {
            return;
        }
        for (start, version) in &writes[..acknowledged] {
            wrote(region, *start, 16, *version);
        }
        let Some((start, version)) = writes.get(acknowledged) else {
            return;
        };
        for page in *start..start + 16 {
            let (found, _) = region.client.read_page(page).unwrap();
            let known = region.pages[page as usize].version;
            assert!(found == known || found == *version, "page {page}: {found}, not {known}");
            if found == *version {
                wrote(region, page, 1, *version);
            }
        }
    }

    fn write(&mut self, at: usize, start: u64, count: u64) {
        self.version += 1;
        let version = self.version;
        let region = &mut self.regions[at];
        let message: Vec<_> =
            (start..start + count).map(|page| (page, version, bytes(page, version))).collect();
        let written = region.client.write_pages(&message);
        if region.is_frozen {
            assert_eq!(written, Err(RefusalCode::Frozen));
            return;
        }
        assert_eq!(written, Ok(()));
        wrote(region, start, count, version);
    }

    fn check(&mut self, at: usize, start: u64, count: u64) {
        let region = &mut self.regions[at];
        for page in start..start + count {
            let (version, found) = region.client.read_page(page).unwrap();
            let known = &region.pages[page as usize];
            assert_eq!(version, known.version, "{} page {page}", region.name);
            assert!(found == *known.bytes, "{} page {page} version {version}", region.name);
        }
    }

    /// Pages of the region's size, up to 4 KiB of them in one page of 4 KiB: (page, first byte, bytes).
    fn part(&mut self, at: usize) -> (u64, u16, u16) {
        let units = PAGE_SIZE as u64 / u64::from(self.page_bytes);
        let page = self.next(self.regions[at].len());
        let first = self.next(units);
        let count = 1 + self.next(units - first);
        let bytes = |units: u64| units as u16 * self.page_bytes as u16;
        (page, bytes(first), bytes(count))
    }

    fn write_parts(&mut self, at: usize) {
        self.version += 1;
        let version = self.version;
        let part = self.part(at);
        let mut parts = vec![part];
        // Of another page, or that would be the same version twice.
        if usize::from(part.2) <= PAGE_SIZE / 2 && part.0 > 0 {
            parts.push((self.next(part.0), part.1, part.2));
        }
        let region = &mut self.regions[at];
        let bytes = bytes(part.0, version);
        let message: Vec<_> = parts
            .iter()
            .map(|(page, first, count)| {
                let first = usize::from(*first);
                let content = &bytes[first..first + usize::from(*count)];
                (*page, version, first as u16, content)
            })
            .collect();
        let written = patiently(|| region.client.write_parts(&message));
        if region.is_frozen {
            assert_eq!(written, Err(RefusalCode::Frozen));
            return;
        }
        assert_eq!(written, Ok(()));
        for (page, version, first, content) in message {
            let known = &mut region.pages[page as usize];
            let first = usize::from(first);
            Arc::make_mut(&mut known.bytes)[first..first + content.len()].copy_from_slice(content);
            known.version = version;
        }
    }

    fn check_parts(&mut self, at: usize) {
        let part = self.part(at);
        let mut parts = vec![part];
        if usize::from(part.2) <= PAGE_SIZE / 2 {
            parts.push(((part.0 + 1) % self.regions[at].len(), part.1, part.2));
        }
        let region = &mut self.regions[at];
        let found = patiently(|| region.client.read_parts(&parts)).unwrap();
        for ((page, first, count), (version, found)) in parts.into_iter().zip(found) {
            let known = &region.pages[page as usize];
            let first = usize::from(first);
            assert_eq!(version, known.version, "{} page {page}", region.name);
            let expected = &known.bytes[first..first + usize::from(count)];
            assert!(found == expected, "{} page {page} from byte {first}", region.name);
        }
    }

    fn free_part(&mut self, at: usize) {
        self.version += 1;
        let (version, part) = (self.version, self.part(at));
        let (page, first, count) = part;
        let unwritten = self.unwritten(&self.regions[at], page);
        let region = &mut self.regions[at];
        let freed = patiently(|| region.client.free_parts(&[part], version));
        if region.is_frozen || region.pins[page as usize] {
            assert!(matches!(freed, Err(RefusalCode::Frozen | RefusalCode::Pinned)));
            return;
        }
        assert!(matches!(freed, Ok(()) | Err(RefusalCode::AlreadyFree)), "{freed:?}");
        // It has no version if nothing of it is stored any more, and the former one if nothing was.
        let (found, _) = patiently(|| region.client.read_parts(&[part])).unwrap().remove(0);
        let known = &mut region.pages[page as usize];
        assert!([0, known.version, version].contains(&found), "{found}");
        let range = usize::from(first)..usize::from(first) + usize::from(count);
        Arc::make_mut(&mut known.bytes)[range.clone()].copy_from_slice(&unwritten.bytes[range]);
        known.version = found;
    }

    /// What is dirty is in the file then; all else of it is as it was.
    fn flush(&mut self, at: usize, start: u64, count: u64) {
        patiently(|| self.regions[at].client.over(Action::Flush, start, count)).unwrap();
        let Some((path, pages)) = &mut self.file else { unreachable!("it has a file") };
        for page in start..start + count {
            pages[page as usize] = Arc::clone(&self.regions[at].pages[page as usize].bytes);
        }
        let found = std::fs::read(path).unwrap();
        for (page, (found, known)) in found.chunks(PAGE_SIZE).zip(pages).enumerate() {
            assert!(found == &known[..], "page {page} of the file");
        }
    }

    fn invalidate(&mut self, at: usize, start: u64, count: u64) {
        let region = &mut self.regions[at];
        let result = patiently(|| region.client.over(Action::Invalidate, start, count));
        self.forgotten(at, start, count, result.map(|_| ()));
    }

    /// Single pages of 4 KiB, whatever the region's size of pages is.
    fn free(&mut self, at: usize, start: u64, count: u64) {
        let region = &mut self.regions[at];
        let result = patiently(|| region.client.free(start, count));
        self.forgotten(at, start, count, result);
    }

    fn forgotten(&mut self, at: usize, start: u64, count: u64, result: Result<(), RefusalCode>) {
        let region = &mut self.regions[at];
        let range = start as usize..(start + count) as usize;
        if region.is_frozen {
            assert_eq!(result, Err(RefusalCode::Frozen));
        } else if region.pins[range.clone()].contains(&true) {
            assert_eq!(result, Err(RefusalCode::Pinned));
        } else {
            // Pages that were made, but never written, are freed as well.
            if region.pages[range].iter().any(|known| known.version > 0) {
                result.unwrap();
            } else {
                assert!(matches!(result, Ok(_) | Err(RefusalCode::AlreadyFree)), "{result:?}");
            }
            self.forget(at, start..start + count);
        }
    }

    fn bring(&mut self, at: usize, action: Action, start: u64, count: u64) {
        patiently(|| self.regions[at].client.over(action, start, count)).unwrap();
    }

    fn pin(&mut self, at: usize, start: u64, count: u64) {
        let pinned: usize =
            self.regions.iter().flat_map(|region| &region.pins).filter(|pin| **pin).count();
        if pinned > 100 {
            return;
        }
        let region = &mut self.regions[at];
        patiently(|| region.client.over(Action::Pin, start, count)).unwrap();
        region.pins[start as usize..(start + count) as usize].fill(true);
    }

    fn unpin(&mut self, at: usize) {
        let region = &mut self.regions[at];
        let pages = region.len();
        patiently(|| region.client.over(Action::Unpin, 0, pages)).unwrap();
        region.pins.fill(false);
    }

    fn resize(&mut self, at: usize) {
        let most = self.pages();
        let pages = (most / 2 + self.next(most / 2 + 1)).next_multiple_of(self.unit());
        let region = &mut self.regions[at];
        let result = patiently(|| region.client.resize(pages));
        if region.is_frozen {
            assert_eq!(result, Err(RefusalCode::Frozen));
        } else if region.pins.iter().skip(pages as usize).any(|pin| *pin) {
            assert_eq!(result, Err(RefusalCode::Pinned));
        } else {
            assert_eq!(result.unwrap().pages.get(), pages);
            region.pages.truncate(pages as usize);
            region.pins.resize(pages as usize, false);
            let had = region.pages.len() as u64;
            for page in had..pages {
                let known = self.unwritten(&self.regions[at], page);
                self.regions[at].pages.push(known);
            }
        }
    }

    fn prefer(&mut self, at: usize, start: u64, count: u64) {
        let tiers = [None, Some(Tier::Dram), Some(Tier::Compressed), Some(Tier::File)];
        let tier = tiers[self.next(4) as usize];
        let result = patiently(|| self.regions[at].client.prefer(tier, start, count));
        assert!(matches!(result, Ok(_) | Err(RefusalCode::NoTier)), "{result:?}");
    }

    fn copy(&mut self, at: usize) {
        let name = format!("region {}", self.made);
        self.made += 1;
        let (is_frozen, on_access) = (self.next(3) == 0, self.next(3) == 0);
        let action = if is_frozen { Action::Snapshot } else { Action::Clone };
        let region = &mut self.regions[at];
        patiently(|| region.client.copy(action, &name, on_access)).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let (pages, pins) = (region.pages.clone(), vec![false; region.pages.len()]);
        let (is_made, fill) = (region.is_made, region.fill);
        let copy =
            Modelled { name, client, pages, pins, is_frozen, is_made, fill, writes_back: false };
        self.regions.push(copy);
    }

    /// Backs a region up and makes another one from that, after some more was written.
    fn back_up(&mut self, at: usize) {
        let Some(directory) = self.backups.clone() else {
            return;
        };
        let path = directory.join(format!("backup{}", self.next(3)));
        let path = path.to_str().unwrap();
        let is_full = self.next(4) == 0;
        patiently(|| self.regions[at].client.back_up(path, is_full)).unwrap();
        let pages = self.regions[at].pages.clone();
        let start = self.next(self.regions[at].len() - 8);
        self.write(at, start, 8);
        let name = format!("region {}", self.made);
        self.made += 1;
        patiently(|| Raw::restore(self.server, path, &name, false)).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let pins = vec![false; pages.len()];
        // What a file held is in the backup.
        let fill = if self.regions[at].is_made { 0 } else { self.regions[at].fill };
        let (is_frozen, is_made, writes_back) = (false, false, false);
        let restored =
            Modelled { name, client, pages, pins, is_frozen, is_made, fill, writes_back };
        self.regions.push(restored);
        let last = self.regions.len() - 1;
        self.check(last, 0, self.regions[last].len());
    }

    fn delete(&mut self, at: usize) {
        self.unpin(at);
        let mut region = self.regions.swap_remove(at);
        patiently(|| region.client.delete()).unwrap();
    }
}

fn bytes(page: u64, version: u64) -> [u8; PAGE_SIZE] {
    content(page, version, !version.is_multiple_of(3))
}

fn wrote(region: &mut Modelled, start: u64, count: u64, version: u64) {
    for page in start..start + count {
        let bytes = bytes(page, version).into();
        region.pages[page as usize] = Known { version, bytes };
    }
}

fn agrees(page_bytes: u32, is_made: bool, seed: u64) {
    // A disk would be asked for thousands of single pages.
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    // A portion that is made from a file must have room.
    let (memory, file) =
        if page_bytes == 2 << 20 && is_made { (2048, 16 << 10) } else { (256, 8 << 10) };
    let server = TestServer::start(memory, |config| {
        with_file(&directory)(config);
        config.tiers.file.as_mut().unwrap().size = PageCount::new(file).bytes();
        config.promise_percent = 10_000;
        config.limits.inflight_bytes = ByteCount::new(64 * PAGE_SIZE as u64);
        config.directories = vec![directory.path().canonicalize().unwrap()];
    });
    let files = is_made.then(|| directory.path());
    let mut model = Model::new(&server, seed, page_bytes, files);
    model.backups = Some(directory.path().canonicalize().unwrap());
    model.run(2000);
}

#[test]
fn cap_72_every_operation_agrees_with_a_plain_vector_in_pages_of_512_bytes() {
    (0..3).for_each(|seed| agrees(512, seed > 0, seed));
}

#[test]
fn cap_72_every_operation_agrees_with_a_plain_vector_in_pages_of_1_kib() {
    (0..3).for_each(|seed| agrees(1 << 10, seed > 0, 10 + seed));
}

#[test]
fn every_operation_agrees_with_a_plain_vector() {
    (0..4).for_each(|seed| agrees(4 << 10, seed > 1, 20 + seed));
}

#[test]
fn cap_72_every_operation_agrees_with_a_plain_vector_in_pages_of_64_kib() {
    (0..4).for_each(|seed| agrees(64 << 10, seed > 0, 30 + seed));
}

#[test]
fn cap_72_every_operation_agrees_with_a_plain_vector_in_pages_of_2_mib() {
    (0..4).for_each(|seed| agrees(2 << 20, seed > 0, 40 + seed));
}
