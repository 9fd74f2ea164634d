//! What is mapped: /proc/self/maps, read without allocating per line.

use std::io;
use std::os::fd::OwnedFd;

use crate::AddressRange;

/// What kind of memory a mapping is, as far as paging cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingKind {
    /// Private anonymous memory that may be read and written but not executed: can be paged.
    PrivateAnonymous,
    /// The main thread's stack.
    MainStack,
    /// Memory shared with other processes or backed by a writable shared file.
    Shared,
    /// Private memory that is not readable and writable (guards, read-only data, code), or backed
    /// by a file.
    Other,
}

/// One line of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where.
    pub range: AddressRange,
    /// What.
    pub kind: MappingKind,
}

/// /proc/self/maps, opened once.
#[derive(Debug)]
pub struct ProcessMaps {
    file: OwnedFd,
    buffer: Box<[u8]>,
}

/// Bytes read at once; the kernel gives whole lines up to a page at a time anyway.
const BUFFER_BYTES: usize = 16 << 10;

impl ProcessMaps {
    /// Opens the map of the calling process's address space.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn open() -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let file =
            rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() })
    }

    /// Calls `each` for every mapping in the order of addresses. The map is read in several
    /// steps: a mapping that changes meanwhile may be seen in its old or its new form.
    ///
    /// # Errors
    /// If reading fails.
    pub fn for_each(&mut self, each: &mut dyn FnMut(Mapping)) -> io::Result<()> {
        rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Start(0))?;
        let mut filled = 0;
        loop {
            let count = rustix::io::read(&self.file, &mut self.buffer[filled..])?;
            if count == 0 {
                return Ok(());
            }
            filled += count;
            let Some(end) = self.buffer[..filled].iter().rposition(|&b| b == b'\n') else {
                // A line longer than the buffer: a path of several KiB. Not anonymous memory.
                filled = 0;
                continue;
            };
            for line in self.buffer[..end].split(|&b| b == b'\n') {
                if let Some(mapping) = parse(line) {
                    each(mapping);
                }
            }
            self.buffer.copy_within(end + 1..filled, 0);
            filled -= end + 1;
        }
    }
}

/// Calls `each` for the parts of `ranges`, which are in order and apart, whose missing pages are
/// reported to a userfaultfd. What the kernel says of one mapping is true of all of it at one instant.
///
/// It walks over all memory of the process, some 10 ms for a gigabyte: for what [`ProcessMaps`] cannot
/// tell.
///
/// # Errors
/// If /proc/self/smaps cannot be read.
pub fn registered_parts(
    ranges: &[AddressRange],
    each: &mut dyn FnMut(AddressRange),
) -> io::Result<()> {
    use std::io::BufRead;
    let mut of_mapping = AddressRange::new(0, 0);
    for line in io::BufReader::new(std::fs::File::open("/proc/self/smaps")?).split(b'\n') {
        let line = line?;
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            // "um": missing pages are a userfaultfd's.
            if flags.split(|&b| b == b' ').any(|flag| flag == b"um") {
                let first = ranges.partition_point(|range| range.end() <= of_mapping.start());
                let there = ranges[first..].iter().map(|range| range.intersect(of_mapping));
                there.take_while(|part| !part.is_empty()).for_each(&mut *each);
            }
        } else if let Some(mapping) = parse(&line) {
            of_mapping = mapping.range;
        }
    }
    Ok(())
}

/// `start-end perms offset major:minor inode [path]`
fn parse(line: &[u8]) -> Option<Mapping> {
    let mut fields = line.split(|&b| b == b' ').filter(|field| !field.is_empty());
    let addresses = fields.next()?;
    let dash = addresses.iter().position(|&b| b == b'-')?;
    let range = AddressRange::new(hex(&addresses[..dash])?, hex(&addresses[dash + 1..])?);
    let permissions = fields.next()?;
    let inode = fields.nth(2)?;
    let name = fields.next().unwrap_or(b"");
    let kind = if permissions.get(3) == Some(&b's') {
        MappingKind::Shared
    } else if name == b"[stack]" {
        MappingKind::MainStack
    } else if permissions.starts_with(b"rw-") && inode == b"0" && pageable_name(name) {
        MappingKind::PrivateAnonymous
    } else {
        MappingKind::Other
    };
    Some(Mapping { range, kind })
}

/// Names that the kernel gives to memory which is anonymous and ordinary.
fn pageable_name(name: &[u8]) -> bool {
    name.is_empty() || name == b"[heap]" || name.starts_with(b"[anon:")
}

fn hex(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() || digits.len() > 16 {
        return None;
    }
    digits.iter().try_fold(0usize, |value, &digit| {
        let digit = char::from(digit).to_digit(16)?;
        Some(value << 4 | digit as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_classified() {
        let check = |line: &str, kind: MappingKind| {
            assert_eq!(parse(line.as_bytes()).map(|m| m.kind), Some(kind), "{line}");
        };
        use MappingKind::{MainStack, Other, PrivateAnonymous, Shared};
        check("7f00a000-7f00c000 rw-p 00000000 00:00 0 ", PrivateAnonymous);
        check("7f00a000-7f00c000 rw-p 00000000 00:00 0 [heap]", PrivateAnonymous);
        check("7f00a000-7f00c000 rw-p 00000000 00:00 0 [anon: go heap]", PrivateAnonymous);
        check("7ffc0000-7ffc2000 rw-p 00000000 00:00 0 [stack]", MainStack);
        check("7f00a000-7f00c000 rw-s 00000000 00:01 77 /memfd:x (deleted)", Shared);
        check("7f00a000-7f00c000 rw-p 00001000 fe:00 77 /usr/lib/libc.so.6", Other);
        check("7f00a000-7f00c000 ---p 00000000 00:00 0 ", Other);
        check("7f00a000-7f00c000 rwxp 00000000 00:00 0 ", Other);
    }

    /// The kernel registers what is there of a range at that moment, and says nothing of the rest:
    /// what is mapped there later is nobody's.
    #[test]
    fn what_is_mapped_into_a_registered_range_later_is_not_registered() {
        use crate::{Area, Features, Uffd};
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let Ok(uffd) = Uffd::new(Features::FaultsOnly) else {
            eprintln!("skipped: no userfaultfd here");
            return;
        };
        let area = Area::new(96 << 12).unwrap();
        let start = area.range().start();
        uffd.register(area.range()).unwrap();
        let middle = (start + (32 << 12)) as *mut core::ffi::c_void;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: replaces a part of our own area, which nothing refers to.
        unsafe { mmap_anonymous(middle, 32 << 12, access, flags) }.unwrap();
        let mut parts = Vec::new();
        registered_parts(&[area.range()], &mut |part| parts.push(part)).unwrap();
        let wanted =
            [AddressRange::pages_from(start, 32), AddressRange::pages_from(start + (64 << 12), 32)];
        assert_eq!(parts, wanted);
    }

    #[test]
    fn own_map_has_this_stack_and_a_heap_block() {
        let mut maps = ProcessMaps::open().unwrap();
        let block = vec![1u8; 1 << 20];
        let mut found = false;
        maps.for_each(&mut |mapping| {
            found |= mapping.kind == MappingKind::PrivateAnonymous
                && mapping.range.contains(block.as_ptr() as usize);
        })
        .unwrap();
        assert!(found);
    }
}
