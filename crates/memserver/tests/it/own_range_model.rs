//! Clones that have ranges of one file, and copies of them, against plain vectors: of what each region
//! holds, and of the file. The server is killed, also in the midst of flushes, or hands over.

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use farmem_region::{PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_wire::{
    Action, Copy, FileRange, HEADER_BYTES, Header, PAGE_SIZES, RangeEntry, RefusalCode, Source,
    seal,
};

use crate::raw::{Raw, TestServer, patiently};
use crate::restart::{in_a_process, in_memory, started};
use crate::tiers::content;

/// Ranges of the file, each as long as a region.
const RANGES: u64 = 4;

struct Modelled {
    name: String,
    client: Raw,
    bytes: Vec<u8>,
    /// Which range of the file it has, if it has any.
    range: Option<u64>,
    /// Whether the range holds all of it but for what is dirty.
    is_filled: bool,
}

struct Model<'a> {
    server: &'a TestServer,
    page_bytes: u32,
    /// Of a region.
    pages: u64,
    path: PathBuf,
    file: Vec<u8>,
    regions: Vec<Modelled>,
    random: u64,
    version: u64,
    made: u64,
    /// Flushes in which the server was killed, and what of them had come to nothing.
    kills: (u64, u64),
}

impl<'a> Model<'a> {
    fn new(server: &'a TestServer, seed: u64, page_bytes: u32, directory: &Path) -> Self {
        let pages = if page_bytes == 2 << 20 { 1024 } else { 208 };
        let file: Vec<u8> = (0..pages * RANGES).flat_map(|page| content(page, 1, true)).collect();
        let path = directory.join("file");
        fs::write(&path, &file).unwrap();
        let bytes = file[..pages as usize * PAGE_SIZE].to_vec();
        let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
        let size = bytes.len() as u64;
        Raw::greeted(server).create("0", size, page_bytes, source).unwrap();
        let client = Raw::opened(server, "0").unwrap();
        let name = "0".to_owned();
        let regions = vec![Modelled { name, client, bytes, range: Some(0), is_filled: true }];
        let random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        let (version, made, kills) = (1, 1, (0, 0));
        Self { server, page_bytes, pages, path, file, regions, random, version, made, kills }
    }

    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn run(mut self, steps: u64) -> (u64, u64) {
        for _ in 0..steps {
            self.step();
        }
        for at in 0..self.regions.len() {
            self.check(at, 0..self.pages);
        }
        for at in 0..self.regions.len() {
            self.flush(at, 0..self.pages);
        }
        while let Some(mut region) = self.regions.pop() {
            patiently(|| region.client.delete()).unwrap();
        }
        self.server.wait_until_empty();
        assert_eq!(self.server.stat().table_bytes, 0);
        self.kills
    }

    fn step(&mut self) {
        let at = self.next(self.regions.len() as u64) as usize;
        let start = self.next(self.pages);
        let range = start..self.pages.min(start + 1 + self.next(32));
        match self.next(100) {
            0..20 if self.page_bytes < 4096 => self.write_part(at, start),
            0..38 => self.write(at, range.start..range.end.min(start + 16)),
            38..62 => self.check(at, range),
            62..70 => self.flush(at, range),
            70..74 => self.flush(at, 0..self.pages),
            74..78 => self.kill_in_a_flush(at),
            78..79 => self.restart(None),
            79..84 => self.invalidate(at, range),
            84..92 => self.give_range(at),
            92..95 if self.regions.len() < 7 => self.copy(at, None),
            95..99 if at > 0 => {
                let mut region = self.regions.swap_remove(at);
                patiently(|| region.client.delete()).unwrap();
            }
            _ => {}
        }
    }

    /// Widened to whole portions.
    fn whole(&self, range: Range<u64>) -> Range<u64> {
        let unit = (u64::from(self.page_bytes) / PAGE_SIZE as u64).max(1);
        range.start / unit * unit..range.end.next_multiple_of(unit)
    }

    fn write(&mut self, at: usize, range: Range<u64>) {
        self.version += 1;
        let version = self.version;
        let pages: Vec<_> =
            range.map(|page| (page, version, content(page, version, page % 3 > 0))).collect();
        let region = &mut self.regions[at];
        region.client.write_pages(&pages).unwrap();
        for (page, _, bytes) in pages {
            region.bytes[bytes_of(page..page + 1)].copy_from_slice(&bytes);
        }
    }

    fn write_part(&mut self, at: usize, page: u64) {
        self.version += 1;
        let parts = PAGE_SIZE as u64 / u64::from(self.page_bytes);
        let (first, part) = (self.next(parts) as usize, self.page_bytes as usize);
        let bytes = &content(page, self.version, true)[..part];
        let message = [(page, self.version, (first * part) as u16, bytes)];
        let region = &mut self.regions[at];
        patiently(|| region.client.write_parts(&message)).unwrap();
        let start = page as usize * PAGE_SIZE + first * part;
        region.bytes[start..start + part].copy_from_slice(bytes);
    }

    fn check(&mut self, at: usize, range: Range<u64>) {
        let region = &mut self.regions[at];
        for page in range {
            let (_, found) = region.client.read_page(page).unwrap();
            let expected = &region.bytes[bytes_of(page..page + 1)];
            assert!(
                found == expected,
                "page {page} of {}, filled: {}",
                region.name,
                region.is_filled
            );
        }
    }

    /// What is dirty in a range is in the file then, and all of a clone that was not flushed before.
    fn flush(&mut self, at: usize, range: Range<u64>) {
        let mut range = self.whole(range);
        let region = &mut self.regions[at];
        let flushed = region.client.over(Action::Flush, range.start, range.end - range.start);
        let Some(place) = region.range else {
            assert_eq!(flushed, Err(RefusalCode::NoFile));
            return;
        };
        flushed.unwrap();
        if !region.is_filled {
            (range, region.is_filled) = (0..self.pages, true);
        }
        let start = place * self.pages;
        self.file[bytes_of(start + range.start..start + range.end)]
            .copy_from_slice(&region.bytes[bytes_of(range.clone())]);
        assert!(!region.client.show().is_unfilled);
        self.check_file();
    }

    fn check_file(&self) {
        let found = fs::read(&self.path).unwrap();
        let differs =
            |page: &u64| found[bytes_of(*page..*page + 1)] != self.file[bytes_of(*page..*page + 1)];
        let wrong: Vec<_> = (0..self.pages * RANGES).filter(differs).collect();
        assert!(wrong.is_empty() && found.len() == self.file.len(), "pages {wrong:?} of the file");
    }

    /// Kills the server while it flushes. Nothing is lost, and only the range that was flushed has changed.
    fn kill_in_a_flush(&mut self, at: usize) {
        let Some(place) = self.regions[at].range else { return };
        if self.server.process.is_none() {
            return;
        }
        let count = PageCount::new(self.pages);
        let range = PageRange { start: PageIndex::new(0), count };
        let pause = std::time::Duration::from_micros(self.next(4000));
        let client = &mut self.regions[at].client;
        let header = Header { entries: 1, request: 1 << 40, ..client.request(Action::Flush) };
        let mut message = vec![0; HEADER_BYTES];
        RangeEntry(range).encode(&mut message);
        seal(header, &mut message);
        client.stream.write_all(&message).unwrap();
        std::thread::sleep(pause);
        self.restart(Some(at));
        let region = &mut self.regions[at];
        let was_unfilled = !region.is_filled;
        let is_unfilled = region.client.show().is_unfilled;
        assert!(was_unfilled || !is_unfilled);
        region.is_filled = !is_unfilled;
        self.kills.0 += 1;
        self.kills.1 += u64::from(is_unfilled);
        let found = fs::read(&self.path).unwrap();
        let flushed = bytes_of(place * self.pages..(place + 1) * self.pages);
        self.file[flushed.clone()].copy_from_slice(&found[flushed]);
        self.check_file();
        for at in 0..self.regions.len() {
            self.check(at, 0..self.pages.min(300));
        }
    }

    /// One of them may have been flushed meanwhile.
    fn restart(&mut self, flushed: Option<usize>) {
        match &self.server.process {
            Some(_) => self.server.restart(),
            None => self.server.hand_over(),
        }
        for (at, region) in self.regions.iter_mut().enumerate() {
            region.client = Raw::opened(self.server, &region.name).unwrap();
            let is_unfilled = region.client.show().is_unfilled;
            assert!(is_unfilled != region.is_filled || flushed == Some(at));
        }
    }

    /// What was not flushed is dropped: a range of the file is what the region is.
    fn invalidate(&mut self, at: usize, range: Range<u64>) {
        let range = self.whole(range);
        let region = &mut self.regions[at];
        let Some(place) = region.range.filter(|_| region.is_filled) else { return };
        let count = range.end - range.start;
        let freed = region.client.over(Action::Invalidate, range.start, count);
        assert!(matches!(freed, Ok(_) | Err(RefusalCode::AlreadyFree)), "{freed:?}");
        let start = place * self.pages;
        let there = &self.file[bytes_of(start + range.start..start + range.end)];
        region.bytes[bytes_of(range)].copy_from_slice(there);
    }

    /// A clone with a range of its own, if one is free that nothing else is made from.
    fn give_range(&mut self, at: usize) {
        let range = self.next(RANGES);
        let is_held = |region: &Modelled| region.range == Some(range);
        if self.regions.len() < 7 || self.regions.iter().any(is_held) {
            self.copy(at, Some(range));
        }
    }

    fn copy(&mut self, at: usize, range: Option<u64>) {
        let name = self.made.to_string();
        self.made += 1;
        let path = self.path.clone();
        let is_named = self.next(2) == 0;
        let own = range.map(|range| {
            let path = if is_named { "" } else { path.to_str().unwrap() };
            FileRange { path, offset: range * self.pages * PAGE_SIZE as u64 }
        });
        let on_access = self.next(3) == 0;
        let copy = Copy { on_access, name: &name, range: own };
        let region = &mut self.regions[at];
        let made = patiently(|| region.client.copy_to(Action::Clone, &copy));
        let is_held = range
            .is_some_and(|range| self.regions.iter().any(|region| region.range == Some(range)));
        match made {
            Ok(info) => assert!(!is_held && info.is_unfilled == range.is_some(), "{info:?}"),
            Err(RefusalCode::RangeTaken) => {
                // Or copies of who had it are made from it.
                assert!(
                    is_held
                        || self
                            .regions
                            .iter()
                            .any(|region| region.range.is_none() || !region.is_filled)
                );
                return;
            }
            Err(other) => panic!("{other:?}"),
        }
        self.check_file();
        let client = Raw::opened(self.server, &name).unwrap();
        let (bytes, is_filled) = (self.regions[at].bytes.clone(), range.is_none());
        self.regions.push(Modelled { name, client, bytes, range, is_filled });
    }
}

fn bytes_of(pages: Range<u64>) -> Range<usize> {
    pages.start as usize * PAGE_SIZE..pages.end as usize * PAGE_SIZE
}

fn agrees_though_killed(page_bytes: u32, seed: u64) {
    let place = in_memory();
    let directory = place.path().canonicalize().unwrap();
    if page_bytes == 2 << 20 {
        // As much as two portions of a few regions.
        fs::write(place.path().join("memory"), "8192").unwrap();
    }
    let server = TestServer::spawn(in_a_process(place.path().to_owned()));
    let steps = if page_bytes == 2 << 20 { 200 } else { 600 };
    let (kills, unfilled) = Model::new(&server, seed, page_bytes, &directory).run(steps);
    eprintln!("{kills} kills in a flush, {unfilled} of them before the range was filled");
}

#[test]
fn cap_22_cap_30_own_ranges_agree_with_plain_vectors_though_the_server_is_killed() {
    agrees_though_killed(4 << 10, 1);
    agrees_though_killed(4 << 10, 2);
}

#[test]
fn cap_22_cap_30_cap_72_own_ranges_agree_with_plain_vectors_in_small_pages() {
    agrees_though_killed(PAGE_SIZES[0], 3);
    agrees_though_killed(PAGE_SIZES[1], 4);
}

#[test]
fn cap_22_cap_30_cap_72_own_ranges_agree_with_plain_vectors_in_large_pages() {
    agrees_though_killed(PAGE_SIZES[3], 5);
    agrees_though_killed(PAGE_SIZES[4], 6);
}

#[test]
fn cap_22_cap_30_own_ranges_agree_with_plain_vectors_though_the_server_hands_over() {
    for (seed, page_bytes) in [(7, 512), (8, 4096)] {
        let place = in_memory();
        let directory = place.path().canonicalize().unwrap();
        let server = started(place.path(), |_| ());
        Model::new(&server, seed, page_bytes, &directory).run(600);
    }
}
