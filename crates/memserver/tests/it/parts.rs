//! Pages of 512 bytes and 1 KiB, one by one.

use std::fs;
use std::os::unix::fs::FileExt;

use farmem_region::{Checksum, PAGE_SIZE, PageIndex, Version};
use farmem_wire::{
    Action, Header, PARTS_BYTES_MAX, PARTS_PER_MESSAGE_MAX, PartEntry, RefusalCode, Source,
    part_checksum,
};

use crate::raw::{Raw, TestServer};

impl Raw {
    /// Parts (page, first byte, bytes) in their versions.
    pub(crate) fn read_parts(
        &mut self,
        parts: &[(u64, u16, u16)],
    ) -> Result<Vec<(u64, Vec<u8>)>, RefusalCode> {
        let header = Header { entries: parts.len() as u32, ..self.request(Action::ReadParts) };
        let (reply, entries, bytes) = self.call_all(header, |out| {
            parts.iter().for_each(|part| entry(*part, 0).encode(out));
        });
        if let Some(code) = reply.refusal {
            return Err(code);
        }
        let mut bytes = &bytes[..];
        let mut found = Vec::new();
        for (entry, wanted) in PartEntry::decode_all(&entries).zip(parts) {
            assert_eq!((entry.page.get(), entry.first, entry.bytes), *wanted);
            let (content, rest) = bytes.split_at(entry.bytes.into());
            let (page, version) = (entry.page, entry.version);
            let checksum = part_checksum(header.region, page, version, entry.first, content);
            assert_eq!(entry.checksum, checksum);
            found.push((version.get(), content.to_vec()));
            bytes = rest;
        }
        assert_eq!((found.len(), bytes.len()), (parts.len(), 0));
        Ok(found)
    }

    /// Parts: (page, version, first byte, bytes).
    pub(crate) fn write_parts(
        &mut self,
        parts: &[(u64, u64, u16, &[u8])],
    ) -> Result<(), RefusalCode> {
        let header = Header { entries: parts.len() as u32, ..self.request(Action::WriteParts) };
        let (reply, _) = self.call(header, |out| {
            for (page, version, first, content) in parts {
                let part = entry((*page, *first, content.len() as u16), *version);
                let checksum =
                    part_checksum(header.region, part.page, part.version, *first, content);
                PartEntry { checksum, ..part }.encode(out);
            }
            parts.iter().for_each(|(.., content)| out.extend_from_slice(content));
        });
        reply.refusal.map_or(Ok(()), Err)
    }

    pub(crate) fn free_parts(
        &mut self,
        parts: &[(u64, u16, u16)],
        version: u64,
    ) -> Result<(), RefusalCode> {
        let header = Header { entries: parts.len() as u32, ..self.request(Action::FreeParts) };
        let (reply, _) = self.call(header, |out| {
            parts.iter().for_each(|part| entry(*part, version).encode(out));
        });
        reply.refusal.map_or(Ok(()), Err)
    }
}

fn entry((page, first, bytes): (u64, u16, u16), version: u64) -> PartEntry {
    let (page, version) = (PageIndex::new(page), Version::new(version));
    PartEntry { page, version, checksum: Checksum::new(0), first, bytes }
}

/// A server, and a file of four pages whose every eighth holds another byte.
fn start() -> (TestServer, tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let content: Vec<u8> = (0..32).flat_map(|at| [100 + at; 512]).collect();
    fs::write(&path, content).unwrap();
    let allowed = directory.path().canonicalize().unwrap();
    let server = TestServer::start(1024, |config| config.directories = vec![allowed]);
    (server, directory, path)
}

fn made(server: &TestServer, page_bytes: u32, source: Source<'_>) -> Raw {
    Raw::greeted(server).create("r", 4 * PAGE_SIZE as u64, page_bytes, source).unwrap();
    Raw::opened(server, "r").unwrap()
}

#[test]
fn cap_1_cap_6_cap_72_a_small_page_is_read_from_the_file_by_itself() {
    for unit in [512, 1024_u16] {
        let (server, _directory, path) = start();
        let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
        let mut region = made(&server, unit.into(), source);
        let first = 2 * unit;
        let eighth = 100 + (first / 512) as u8;
        assert_eq!(region.read_parts(&[(0, first, 512.max(unit))]).unwrap()[0].1[0], eighth);
        // What was not read is as the file has it now.
        fs::write(&path, [7; 4 * PAGE_SIZE]).unwrap();
        let all: Vec<_> = (0..8 * 512 / unit).map(|at| (0, at * unit, unit)).collect();
        for (part, (version, bytes)) in all.iter().zip(region.read_parts(&all).unwrap()) {
            let expected = if part.1 == first { eighth } else { 7 };
            assert_eq!((version, bytes[0]), (0, expected), "{part:?}");
        }
        // So it is with a write, and with a read of all 4 KiB after it.
        region.write_parts(&[(1, 1, unit, &vec![9; usize::from(unit)])]).unwrap();
        fs::write(&path, [8; 4 * PAGE_SIZE]).unwrap();
        let (version, page) = region.read_page(1).unwrap();
        let written = |at: usize| (usize::from(unit)..2 * usize::from(unit)).contains(&at);
        assert!((0..PAGE_SIZE).all(|at| page[at] == if written(at) { 9 } else { 8 }));
        assert_eq!(version, 1);
    }
}

#[test]
fn cap_7_cap_15_cap_72_a_small_page_is_dirty_and_written_back_by_itself() {
    let (server, _directory, path) = start();
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let mut region = made(&server, 512, source);
    region.read_page(0).unwrap();
    region.write_parts(&[(0, 1, 512, &[1; 512]), (2, 1, 3584, &[2; 512])]).unwrap();
    region.free_parts(&[(2, 3584, 512)], 2).unwrap();
    region.write_parts(&[(3, 1, 0, &[3; 1024])]).unwrap();
    // Who writes back more than what is dirty writes over this.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[77; 512], 0).unwrap();
    file.write_all_at(&[77; 512], 2 * 4096 + 3584).unwrap();
    file.write_all_at(&[77; 512], 3 * 4096 + 1024).unwrap();
    assert_eq!(region.over(Action::Flush, 0, 4), Ok(2));
    let mut expected: Vec<u8> = (0..32).flat_map(|at| [100 + at; 512]).collect();
    expected[..512].fill(77);
    expected[512..1024].fill(1);
    expected[2 * 4096 + 3584..3 * 4096].fill(77);
    expected[3 * 4096..3 * 4096 + 1024].fill(3);
    expected[3 * 4096 + 1024..3 * 4096 + 1536].fill(77);
    assert!(fs::read(&path).unwrap() == expected);
    assert_eq!(region.over(Action::Flush, 0, 4), Ok(0), "nothing is dirty");
    // All of a page, of which a part was absent, is as it was written, zeros too.
    region.write_parts(&[(1, 1, 0, &[9; 512])]).unwrap();
    region.write(&[(1, 2, 0)]).unwrap();
    region.over(Action::Flush, 0, 4).unwrap();
    assert!(fs::read(&path).unwrap()[4096..8192] == [0; 4096]);
    // What was freed is read from the file again.
    assert_eq!(region.read_parts(&[(2, 3584, 512)]).unwrap(), [(0, vec![77; 512])]);
    assert_eq!(region.free_parts(&[(0, 1024, 512)], 0), Err(RefusalCode::Malformed));
}

#[test]
fn cap_7_cap_72_small_pages_of_a_fill_and_of_nothing() {
    let (server, ..) = start();
    let mut region = made(&server, 1024, Source::Fill(5));
    assert_eq!(region.read_parts(&[(3, 2048, 2048)]).unwrap(), [(0, vec![5; 2048])]);
    assert_eq!(server.stat().slots, 0, "it takes no memory");
    region.write_parts(&[(3, 4, 2048, &[6; 1024])]).unwrap();
    let found = region.read_parts(&[(3, 1024, 1024), (3, 2048, 1024)]).unwrap();
    assert_eq!(found, [(4, vec![5; 1024]), (4, vec![6; 1024])]);
    region.free_parts(&[(3, 2048, 1024)], 5).unwrap();
    assert_eq!(region.read_parts(&[(3, 2048, 1024)]).unwrap(), [(5, vec![5; 1024])]);
    assert_eq!(region.free_parts(&[(1, 0, 1024)], 9), Err(RefusalCode::AlreadyFree));
    region.delete().unwrap();
    // What is made from nothing is never there in part only.
    let mut region = made(&server, 512, Source::Nothing);
    assert_eq!(region.read_parts(&[(0, 0, 512)]), Err(RefusalCode::NoPage));
    assert_eq!(region.write_parts(&[(0, 1, 0, &[1; 512])]), Err(RefusalCode::NoPage));
    region.write(&[(0, 1, 1)]).unwrap();
    region.write_parts(&[(0, 2, 512, &[2; 512])]).unwrap();
    let found = region.read_parts(&[(0, 0, 512), (0, 512, 512)]).unwrap();
    assert_eq!(found, [(2, vec![1; 512]), (2, vec![2; 512])]);
    assert_eq!(region.free_parts(&[(0, 0, 512)], 3), Err(RefusalCode::Malformed));
}

/// Parts of one page in one message are written in its order; those that only their bytes tell apart are refused,
/// and none of them written.
#[test]
fn parts_of_one_page_in_one_message_need_growing_versions() {
    let (server, _directory, _) = start();
    let mut region = made(&server, 512, Source::Fill(5));
    let [one, two]: [&[u8]; 2] = [&[1; 512], &[2; 512]];
    region.write_parts(&[(1, 1, 0, one), (2, 1, 0, one), (1, 2, 512, two)]).unwrap();
    let both = [(1, 0, 512), (1, 512, 512)];
    let expected = [(2, one.to_vec()), (2, two.to_vec())];
    assert_eq!(region.read_parts(&both).unwrap(), expected);
    for [first, second] in [[3, 3], [4, 3], [0, 3], [3, 0]] {
        let parts = [(1, first, 0, two), (3, 3, 0, two), (1, second, 512, one)];
        assert_eq!(region.write_parts(&parts), Err(RefusalCode::Malformed));
    }
    assert_eq!(region.free_parts(&both, 3), Err(RefusalCode::Malformed));
    assert_eq!(region.read_parts(&both).unwrap(), expected, "nothing has changed");
    assert_eq!(region.read_parts(&[(3, 0, 512)]).unwrap(), [(0, vec![5; 512])]);
}

#[test]
fn what_is_wrong_with_parts_is_refused_and_changes_nothing() {
    let (server, _directory, path) = start();
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let mut region = made(&server, 1024, source);
    for wrong in [(0, 512, 1024), (0, 0, 512), (0, 0, 0), (0, 3072, 2048), (0, 4096, 1024)] {
        assert_eq!(region.read_parts(&[wrong]), Err(RefusalCode::Malformed), "{wrong:?}");
        assert_eq!(region.free_parts(&[wrong], 1), Err(RefusalCode::Malformed), "{wrong:?}");
    }
    assert_eq!(region.read_parts(&[(4, 0, 1024)]), Err(RefusalCode::OutOfBounds));
    let part: &[u8] = &[1; 1024];
    assert_eq!(region.write_parts(&[(4, 1, 0, part)]), Err(RefusalCode::OutOfBounds));
    assert_eq!(region.write_parts(&[(0, 0, 0, part)]), Err(RefusalCode::Malformed));
    region.write_parts(&[(0, 2, 0, part)]).unwrap();
    // The same again is acknowledged; what is older, or something else, is not.
    region.write_parts(&[(0, 2, 0, part)]).unwrap();
    assert_eq!(region.write_parts(&[(0, 2, 0, &[3; 1024])]), Err(RefusalCode::OldVersion));
    assert_eq!(region.write_parts(&[(0, 2, 1024, part)]), Err(RefusalCode::OldVersion));
    assert_eq!(region.write_parts(&[(0, 1, 0, part)]), Err(RefusalCode::OldVersion));
    assert_eq!(region.free_parts(&[(0, 0, 1024)], 1), Err(RefusalCode::OldVersion));
    // Damaged on its way.
    let header = Header { entries: 1, ..region.request(Action::WriteParts) };
    let damaged = entry((0, 0, 1024), 9);
    let (reply, _) = region.call(header, |out| {
        damaged.encode(out);
        out.extend_from_slice(part);
    });
    assert_eq!(reply.refusal, Some(RefusalCode::WrongChecksum));
    // Bytes that no entry names, and entries without bytes.
    for bytes in [0, 512, 2048] {
        let (reply, _) = region.call(header, |out| {
            let checksum = part_checksum(header.region, damaged.page, damaged.version, 0, part);
            PartEntry { checksum, ..damaged }.encode(out);
            out.extend_from_slice(&vec![1; bytes]);
        });
        assert_eq!(reply.refusal, Some(RefusalCode::Malformed), "{bytes}");
    }
    region.over(Action::Pin, 0, 1).unwrap();
    assert_eq!(region.free_parts(&[(0, 0, 1024)], 9), Err(RefusalCode::Pinned));
    assert_eq!(region.read_parts(&[(0, 0, 1024)]).unwrap(), [(2, part.to_vec())]);
    // Others have no such pages.
    region.over(Action::Unpin, 0, 1).unwrap();
    region.delete().unwrap();
    let mut region = made(&server, 4096, Source::Fill(0));
    assert_eq!(region.read_parts(&[(0, 0, 4096)]), Err(RefusalCode::Malformed));
}

#[test]
fn as_many_parts_as_fit_in_a_message_and_one_more() {
    let (server, _directory, path) = start();
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let mut region = made(&server, 512, source);
    let all: Vec<_> = (0..PARTS_PER_MESSAGE_MAX as u16).map(|at| (1, at * 512, 512)).collect();
    assert_eq!(region.read_parts(&all).unwrap().len(), PARTS_PER_MESSAGE_MAX);
    let most: Vec<_> = vec![(0, 0, 512); PARTS_PER_MESSAGE_MAX + 1];
    assert_eq!(region.read_parts(&most), Err(RefusalCode::Malformed));
    assert_eq!(region.read_parts(&[(0, 0, 4096)]).unwrap()[0].1.len(), PARTS_BYTES_MAX);
    let more = [(0, 0, 4096), (1, 0, 512)];
    assert_eq!(region.read_parts(&more), Err(RefusalCode::Malformed));
    region.write_parts(&[(0, 1, 0, &[1; 2048]), (1, 1, 0, &[1; 2048])]).unwrap();
    // The server takes more than that for no message.
    let mut other = Raw::opened(&server, "r").unwrap();
    let header = Header { entries: 1, ..other.request(Action::WriteParts) };
    let (reply, ..) = other.call_all(header, |out| {
        entry((0, 0, 4096), 5).encode(out);
        out.extend_from_slice(&[0; PARTS_BYTES_MAX + 1]);
    });
    assert_eq!(reply.refusal, Some(RefusalCode::Malformed));
    assert!(other.is_dropped());
}
