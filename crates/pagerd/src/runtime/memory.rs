//! The pager's own memory: where it is, so that it is never paged.
//!
//! Everything that the pager maps for itself goes through [`map`], which keeps it out of forked
//! children, core dumps and huge pages, puts a guard page on either side, and records the range.
//! The program's mappings may lie next to ours and look the same in its map: only this table tells
//! them apart.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

pub(crate) const PAGE_BYTES: usize = 4096;

/// Ranges that the pager may own. Heap chunks grow with the heap, so that a hundred of them hold
/// more than a machine has; the rest is for threads, buffers and what the loader passed on. Beyond
/// the limit [`map`] refuses: memory that cannot be recorded must not be used.
const OWNED_RANGES_MAX: usize = 1024;

struct Table {
    ranges: [Range<usize>; OWNED_RANGES_MAX],
    length: usize,
}

impl Table {
    fn push(&mut self, range: Range<usize>) -> io::Result<()> {
        let Some(place) = self.ranges.get_mut(self.length) else {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("the pager already owns {OWNED_RANGES_MAX} ranges of memory, its limit"),
            ));
        };
        *place = range;
        self.length += 1;
        Ok(())
    }
}

static OWNED: Mutex<Table> =
    Mutex::new(Table { ranges: [const { 0..0 }; OWNED_RANGES_MAX], length: 0 });

/// A panic ends the process, so what it left behind is never seen.
fn owned() -> MutexGuard<'static, Table> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every range of memory that belongs to the pager, guard pages included.
///
/// To find the program's memory, read its map first and this afterwards: a range is recorded before
/// the call that maps it returns, and this waits for such calls, so that nothing that the map shows
/// is missing here. Ranges are never taken back.
pub(crate) fn owned_ranges() -> impl Iterator<Item = Range<usize>> {
    (0..).map_while(|index| {
        let table = owned();
        (index < table.length).then(|| table.ranges[index].clone())
    })
}

/// Records a range that was mapped by others for the pager. The caller sees to it that nobody
/// looks for the program's memory between the mapping and this call.
///
/// # Errors
/// The table is full; the range must not be used.
pub(crate) fn own(range: Range<usize>) -> io::Result<()> {
    owned().push(range)
}

/// Whether new memory is to be resident at once or when it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Now,
    WhenTouched,
}

/// Maps `bytes` (rounded up to whole pages) of zeroed memory for the pager, for ever.
///
/// # Errors
/// What the kernel says, or that the table of owned ranges is full.
pub(crate) fn map(bytes: usize, presence: Presence) -> io::Result<NonNull<[u8]>> {
    let refused = || io::Error::from(io::ErrorKind::OutOfMemory);
    let bytes = bytes.checked_next_multiple_of(PAGE_BYTES).ok_or_else(refused)?;
    let whole = bytes.checked_add(2 * PAGE_BYTES).ok_or_else(refused)?;
    let mut table = owned();
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel likes replaces nothing.
    let guard = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), flags)?
    };
    let body = guard.wrapping_byte_add(PAGE_BYTES);
    let mapped = prepare(guard, whole, body, bytes, presence)
        .and_then(|()| table.push(guard.addr()..guard.addr() + whole));
    if let Err(error) = mapped {
        // SAFETY: mapped above and handed to nobody.
        let _ = unsafe { rustix::mm::munmap(guard, whole) };
        return Err(error);
    }
    let body = NonNull::new(body.cast::<u8>()).ok_or_else(refused)?;
    Ok(NonNull::slice_from_raw_parts(body, bytes))
}

fn prepare(
    guard: *mut std::ffi::c_void,
    whole: usize,
    body: *mut std::ffi::c_void,
    bytes: usize,
    presence: Presence,
) -> io::Result<()> {
    // SAFETY: all ranges lie in the caller's fresh mapping, whose content nobody relies on yet.
    unsafe {
        rustix::mm::madvise(guard, whole, Advice::LinuxDontFork)?;
        rustix::mm::madvise(guard, whole, Advice::LinuxDontDump)?;
        // A kernel without huge pages refuses this, and needs it not.
        let _ = rustix::mm::madvise(guard, whole, Advice::LinuxNoHugepage);
        rustix::mm::mprotect(body, bytes, MprotectFlags::READ | MprotectFlags::WRITE)?;
        if presence == Presence::Now {
            rustix::mm::madvise(body, bytes, Advice::LinuxPopulateWrite)?;
        }
    }
    Ok(())
}
