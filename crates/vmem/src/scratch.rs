//! The pager's scratch area: where pages rest on their way out and where fetched pages arrive.
//!
//! It is one reserved range of addresses, divided into windows of [`Scratch::WINDOW_FRAMES`]
//! frames. A frame either holds a page (*present*) or is a hole; presence is tracked here and asserted
//! on every access.
//!
//! Two things happen behind our back. Someone outside reads or locks a hole (a debugger, mlockall), and it
//! has memory: a *stray* page. And a page that the program has given to MADV_FREE, maybe before it was
//! paged, and not written since, is dropped by the kernel when memory is short: then the frame reads as
//! zeros, which is what MADV_FREE permits; a page that has come is written to before anything is read of it,
//! so that it does not change between two looks. So the area does not report missing pages: whoever reads
//! such a frame would wait for the pager, which mostly is the reader.
//!
//! The area is registered with the program's own userfaultfd. That makes moving pages out exclusive
//! with the program's changes of its mappings: the kernel moves pages into a registered range only
//! while no change is under way and none is unread, so what is moved out belongs to what the pager
//! believes it to. A userfaultfd of the area's own would not stop a move from memory that has just
//! been unmapped by one thread and mapped anew by another.

use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use farmem_region::{FrameId, Frames, Lent, Loan, PAGE_SHIFT, PAGE_SIZE};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{AddressRange, Pagemap, Progress, Stop, Uffd, UffdError};

/// Reserved memory made of frames. See the module's text.
#[derive(Debug)]
pub struct Scratch {
    base: NonNull<u8>,
    frames: usize,
    present: Box<[u64]>,
    loans: Arc<Loans>,
    whole: AddressRange,
}

/// The frames that are lent, a bit each.
#[derive(Debug)]
struct Loans {
    to_fill: Box<[AtomicU64]>,
    to_read: Box<[AtomicU64]>,
}

// SAFETY: the area belongs to this value alone, wherever it is.
unsafe impl Send for Scratch {}

/// Bytes that the processor loads at once.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE_BYTES: usize = 64;

impl Scratch {
    /// Frames in a window; a window is moved into by one call.
    pub const WINDOW_FRAMES: usize = 256;

    /// Reserves `windows` windows of holes, registered with `uffd`, which is the one that every other
    /// call must be given too.
    ///
    /// # Errors
    /// [`UffdError`] if the range cannot be mapped or registered.
    pub fn new(uffd: &Uffd, windows: usize) -> Result<Self, UffdError> {
        let frames = windows * Self::WINDOW_FRAMES;
        let bytes = frames << PAGE_SHIFT;
        let other = |doing| {
            move |errno: rustix::io::Errno| UffdError::Other { doing, source: errno.into() }
        };
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(other("reserving the scratch area"))?;
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump, Advice::LinuxNoHugepage] {
            // SAFETY: these advices change no contents, and the range is ours. Kernels built
            // without huge pages refuse the last one, which is as good.
            let _ = unsafe { rustix::mm::madvise(base, bytes, advice) };
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(UffdError::Other {
            doing: "reserving the scratch area",
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        })?;
        let present = vec![0; frames / 64].into_boxed_slice();
        let loans = Arc::new(Loans::new(frames / 64));
        let whole = AddressRange::pages_from(base.as_ptr() as usize, frames);
        let scratch = Self { base, frames, present, loans, whole };
        uffd.register_unreported(whole)?;
        Ok(scratch)
    }

    /// The whole area.
    #[must_use]
    pub const fn range(&self) -> AddressRange {
        self.whole
    }

    /// Number of windows.
    #[must_use]
    pub const fn windows(&self) -> usize {
        self.frames / Self::WINDOW_FRAMES
    }

    /// Address of a frame.
    #[must_use]
    pub fn address(&self, frame: FrameId) -> usize {
        self.range().start() + (self.index(frame) << PAGE_SHIFT)
    }

    /// Whether the frame holds a page.
    #[must_use]
    pub fn is_present(&self, frame: FrameId) -> bool {
        let index = self.index(frame);
        self.present[index / 64] & (1 << (index % 64)) != 0
    }

    /// Moves the pages of `source` that are there into the frames from `first` on, which must be
    /// holes; pages missing in the source leave holes. After it (also after a partial move) the
    /// frames that now hold pages are known by asking the kernel.
    ///
    /// The caller moves out only what it has registered with a userfaultfd and whose faults it
    /// answers: then the move cannot be seen by whoever uses that memory.
    pub fn move_out(
        &mut self,
        uffd: &Uffd,
        source: AddressRange,
        first: FrameId,
        pagemap: &Pagemap,
    ) -> Progress {
        let range = AddressRange::pages_from(self.address(first), source.pages());
        assert!(self.index(first) + source.pages() <= self.frames, "frames past the scratch area");
        // SAFETY: missing pages of the source are answered by the caller; the destination is ours.
        let progress = unsafe { uffd.move_pages(range, source.start(), true, false) };
        self.mark_present(range, pagemap);
        self.keep(first, source.pages());
        progress
    }

    /// Has the kernel keep the pages that these frames hold, which it may drop as long as nobody has written
    /// since MADV_FREE: what is read of them after this call does not change. A page that was dropped before is
    /// zeros.
    fn keep(&self, first: FrameId, count: usize) {
        for frame in (0..count).map(|at| offset(first, at)).filter(|&frame| self.is_present(frame))
        {
            let byte = self.address(frame) as *mut u8;
            // SAFETY: the frame lies in our mapping and is not lent, for it has just been moved into; nobody
            // else has a reference to it.
            let byte = unsafe { AtomicU8::from_ptr(byte) };
            // The processor writes whether they are equal or not, and the byte stays what it is. To add zero
            // would be made a reading by the compiler, and to read and then write would mix a page that
            // is dropped in between.
            let _ = byte.compare_exchange(0, 0, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Moves `count` present frames into the missing pages at `target` through `uffd`, with which
    /// `target` is registered. The frames become holes as far as it came.
    pub fn move_in(
        &mut self,
        uffd: &Uffd,
        target: usize,
        first: FrameId,
        count: usize,
    ) -> Progress {
        self.assert_present(first, count);
        self.assert_free(first, count);
        let range = AddressRange::pages_from(target, count);
        // SAFETY: the source frames are ours, not lent (asserted) and tracked: they are marked as
        // holes below.
        let mut progress = unsafe { uffd.move_pages(range, self.address(first), false, true) };
        if progress.stop == Some(Stop::Hole) {
            // The frames are there (asserted), and written to by us, so that the kernel drops none of
            // them: it is the target that is mapped no more.
            progress.stop = Some(Stop::Gone);
        }
        self.mark(first, progress.bytes >> PAGE_SHIFT, false);
        progress
    }

    /// Has the processor load a frame that is about to be read: what was moved out has not been
    /// touched for long, and to wait for it takes longer than all that is done with it.
    pub fn prefetch(&self, frame: FrameId) {
        #[cfg(target_arch = "x86_64")]
        for line in (0..PAGE_SIZE).step_by(CACHE_LINE_BYTES) {
            let pointer = (self.address(frame) + line) as *const i8;
            // SAFETY: a prefetch reads nothing that the program could see and never faults.
            unsafe {
                core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(pointer);
            };
        }
    }

    /// Copies `count` present frames into the missing pages at `target` through `uffd`.
    pub fn copy_in(&self, uffd: &Uffd, target: usize, first: FrameId, count: usize) -> Progress {
        self.assert_readable(first, count);
        let range = AddressRange::pages_from(target, count);
        // SAFETY: the source frames are present (asserted), and `&self` keeps them unchanged.
        unsafe { uffd.copy(range, self.address(first) as *const u8, true) }
    }

    /// Gives `count` frames that are holes fresh memory. Returns how many got it.
    pub fn populate(&mut self, uffd: &Uffd, first: FrameId, count: usize) -> usize {
        const ZEROS: &[u8; 64 * PAGE_SIZE] = &[0; 64 * PAGE_SIZE];
        let mut done = 0;
        while done < count {
            let frame = offset(first, done);
            let step = (count - done).min(64);
            let range = AddressRange::pages_from(self.address(frame), step);
            // SAFETY: the source is a constant of at least as many bytes.
            let progress = unsafe { uffd.copy(range, ZEROS.as_ptr(), true) };
            let pages = progress.bytes >> PAGE_SHIFT;
            self.mark(frame, pages, true);
            done += pages;
            match progress.stop {
                None => {}
                // Someone outside has read the hole and it was filled; or a partial copy.
                Some(Stop::AlreadyThere) => {
                    self.mark(offset(first, done), 1, true);
                    done += 1;
                }
                Some(Stop::Retry) if pages > 0 => {}
                Some(_) => break,
            }
        }
        done
    }

    /// Gives the memory of `count` frames back to the system: they become holes, but for those that
    /// are still [present](Self::is_present): all of them if the kernel refuses (a program at its
    /// limit of mappings), and a hole that someone outside has touched meanwhile.
    ///
    /// The range is taken out of the userfaultfd for the moment: dropping registered memory is an
    /// event that the kernel waits for, and the caller is the one who reads it.
    pub fn discard(&mut self, uffd: &Uffd, first: FrameId, count: usize, pagemap: &Pagemap) {
        let range = AddressRange::pages_from(self.address(first), count);
        assert!(self.index(first) + count <= self.frames, "frames past the scratch area");
        self.assert_free(first, count);
        if uffd.unregister(range).is_err() {
            return;
        }
        let start = range.start() as *mut core::ffi::c_void;
        // The program may have locked all its memory, and this area with it.
        let advice = Advice::LinuxDontneedLocked;
        // SAFETY: the range lies in our own area (asserted), none of it is lent (asserted), and its
        // holes are tracked: what the frames are now is asked for below.
        let _ = unsafe { rustix::mm::madvise(start, range.bytes(), advice) };
        assert!(
            uffd.register_unreported(range).is_ok(),
            "the scratch area cannot be registered again"
        );
        self.mark(first, count, false);
        self.mark_present(range, pagemap);
    }

    /// Takes note of what the kernel says is there.
    fn mark_present(&mut self, range: AddressRange, pagemap: &Pagemap) {
        let base = self.range().start();
        pagemap.present(range, &mut |run| {
            let at = (run.range.start() - base) >> PAGE_SHIFT;
            for index in at..at + run.range.pages() {
                self.present[index / 64] |= 1 << (index % 64);
            }
        });
    }

    /// Calls `each` for the frames that were holes and have got memory since: they hold nobody's page.
    pub fn find_strays(
        &mut self,
        first: FrameId,
        count: usize,
        pagemap: &Pagemap,
        each: &mut dyn FnMut(FrameId),
    ) {
        let range = AddressRange::pages_from(self.address(first), count);
        let base = self.range().start();
        pagemap.present(range, &mut |run| {
            let at = (run.range.start() - base) >> PAGE_SHIFT;
            for index in at..at + run.range.pages() {
                let (word, bit) = (&mut self.present[index / 64], 1 << (index % 64));
                if *word & bit == 0 {
                    *word |= bit;
                    each(FrameId::new(u32::try_from(index).unwrap_or(u32::MAX)));
                }
            }
        });
    }

    fn index(&self, frame: FrameId) -> usize {
        let index = frame.get() as usize;
        assert!(index < self.frames, "frame {index} of {}", self.frames);
        index
    }

    fn mark(&mut self, first: FrameId, count: usize, present: bool) {
        let start = first.get() as usize;
        for index in start..start + count {
            let bit = 1u64 << (index % 64);
            if present {
                self.present[index / 64] |= bit;
            } else {
                self.present[index / 64] &= !bit;
            }
        }
    }

    fn assert_present(&self, first: FrameId, count: usize) {
        for at in 0..count {
            assert!(self.is_present(offset(first, at)), "frame {} is a hole", first.get());
        }
    }

    /// Panics unless the frames hold pages that nobody changes.
    fn assert_readable(&self, first: FrameId, count: usize) {
        self.assert_present(first, count);
        for at in 0..count {
            let frame = offset(first, at);
            assert!(!self.loans.has(&self.loans.to_fill, frame), "frame {frame} is being filled");
        }
    }

    /// Panics unless the frames are nobody else's.
    fn assert_free(&self, first: FrameId, count: usize) {
        for at in 0..count {
            let frame = offset(first, at);
            let Loans { to_fill, to_read } = &*self.loans;
            let lent = self.loans.has(to_fill, frame) || self.loans.has(to_read, frame);
            assert!(!lent, "frame {frame} is lent");
        }
    }

    /// Lends frames that hold pages until the loan is dropped. Panics if one is a hole, or lent, or
    /// named twice.
    #[must_use]
    pub fn lend(&mut self, frames: &[FrameId], loan: Loan) -> LentFrames {
        for &frame in frames {
            self.assert_present(frame, 1);
            self.assert_free(frame, 1);
            self.loans.set(loan, frame, true);
        }
        let base = self.base;
        LentFrames { base, frames: frames.to_vec(), loan, loans: Arc::clone(&self.loans) }
    }
}

impl Loans {
    fn new(words: usize) -> Self {
        let none = || (0..words).map(|_| AtomicU64::new(0)).collect();
        Self { to_fill: none(), to_read: none() }
    }

    fn has(&self, bits: &[AtomicU64], frame: FrameId) -> bool {
        let index = frame.get() as usize;
        // What was done with the frame before the loan ended is seen after this.
        bits[index / 64].load(Ordering::Acquire) & (1 << (index % 64)) != 0
    }

    fn set(&self, loan: Loan, frame: FrameId, lent: bool) {
        let bits = match loan {
            Loan::Fill => &self.to_fill,
            Loan::Read => &self.to_read,
        };
        let index = frame.get() as usize;
        let bit = 1 << (index % 64);
        if lent {
            bits[index / 64].fetch_or(bit, Ordering::AcqRel);
        } else {
            bits[index / 64].fetch_and(!bit, Ordering::AcqRel);
        }
    }
}

/// Frames that another thread may use: as long as this is there, the scratch area lets nobody else
/// change them, nor read those that are being filled.
#[derive(Debug)]
pub struct LentFrames {
    base: NonNull<u8>,
    frames: Vec<FrameId>,
    loan: Loan,
    loans: Arc<Loans>,
}

// SAFETY: the frames belong to this value, wherever it is, until it is dropped.
unsafe impl Send for LentFrames {}

impl LentFrames {
    fn address(&self, frame: FrameId) -> *mut u8 {
        // SAFETY: the frame was inside the area when it was lent, and the area is not given back
        // while frames of it are lent (`Scratch::release` asserts it).
        unsafe { self.base.as_ptr().add((frame.get() as usize) << PAGE_SHIFT) }
    }
}

impl Lent for LentFrames {
    fn bytes(&self, at: usize) -> &[u8; PAGE_SIZE] {
        let address = self.address(self.frames[at]) as *const [u8; PAGE_SIZE];
        // SAFETY: the frame holds a page, as when it was lent, and nobody changes it meanwhile but
        // through `&mut self`.
        unsafe { &*address }
    }

    fn gather<'a>(&'a self, range: Range<usize>, slices: &mut Vec<IoSlice<'a>>) {
        for (first, count) in runs(&self.frames[range]) {
            // SAFETY: as in `bytes`, for frames that lie side by side in the area.
            let slice =
                unsafe { std::slice::from_raw_parts(self.address(first), count << PAGE_SHIFT) };
            slices.push(IoSlice::new(slice));
        }
    }

    fn gather_mut<'a>(&'a mut self, range: Range<usize>, slices: &mut Vec<IoSliceMut<'a>>) {
        assert_eq!(self.loan, Loan::Fill, "these frames are lent to be read");
        for (first, count) in runs(&self.frames[range]) {
            let address = self.address(first);
            // SAFETY: as in `bytes`; no frame was lent twice, so the runs do not overlap, and
            // `&mut self` excludes every other access.
            let slice = unsafe { std::slice::from_raw_parts_mut(address, count << PAGE_SHIFT) };
            slices.push(IoSliceMut::new(slice));
        }
    }
}

impl Drop for LentFrames {
    fn drop(&mut self) {
        for &frame in &self.frames {
            self.loans.set(self.loan, frame, false);
        }
    }
}

impl Scratch {
    /// Gives the area back. It leaves the userfaultfd first: unmapping registered memory is an event
    /// that the kernel waits for, and the caller is the one who reads it. Without this call the
    /// area stays mapped.
    pub fn release(&mut self, uffd: &Uffd) {
        self.assert_free(FrameId::new(0), self.frames);
        if std::mem::take(&mut self.frames) == 0 || uffd.unregister(self.whole).is_err() {
            return;
        }
        let start = self.base.as_ptr().cast::<core::ffi::c_void>();
        // SAFETY: the mapping is ours, made in `new`; without frames nothing refers into it.
        let _ = unsafe { rustix::mm::munmap(start, self.whole.bytes()) };
    }
}

impl Frames for Scratch {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        self.assert_readable(frame, 1);
        let address = self.address(frame) as *const [u8; PAGE_SIZE];
        // SAFETY: the frame lies in our mapping, holds a page (asserted), is page-aligned, is not
        // being filled (asserted), and `&self` excludes other writers.
        unsafe { &*address }
    }

    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        self.assert_present(frame, 1);
        self.assert_free(frame, 1);
        let address = self.address(frame) as *mut [u8; PAGE_SIZE];
        // SAFETY: as in `bytes`; it is not lent (asserted), and `&mut self` excludes every other
        // access.
        unsafe { &mut *address }
    }

    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<IoSliceMut<'a>>) {
        for (first, count) in runs(frames) {
            self.assert_present(first, count);
            self.assert_free(first, count);
            let address = self.address(first) as *mut u8;
            // SAFETY: present frames of our mapping (asserted) that are not lent (asserted); runs never overlap because a
            // frame named twice would have to appear in two runs, which the check below excludes.
            let slice = unsafe { std::slice::from_raw_parts_mut(address, count << PAGE_SHIFT) };
            slices.push(IoSliceMut::new(slice));
        }
        assert_distinct(frames);
    }

    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<IoSlice<'a>>) {
        for (first, count) in runs(frames) {
            self.assert_readable(first, count);
            let address = self.address(first) as *const u8;
            // SAFETY: present frames of our mapping that are not being filled (asserted); `&self`
            // excludes other writers.
            let slice = unsafe { std::slice::from_raw_parts(address, count << PAGE_SHIFT) };
            slices.push(IoSlice::new(slice));
        }
    }
}

/// The frame `by` places after `frame`.
fn offset(frame: FrameId, by: usize) -> FrameId {
    FrameId::new(frame.get() + u32::try_from(by).unwrap_or(u32::MAX))
}

/// Splits a list of frames into runs of neighbours.
fn runs(frames: &[FrameId]) -> impl Iterator<Item = (FrameId, usize)> + '_ {
    let mut rest = frames;
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let count = rest
            .iter()
            .enumerate()
            .take_while(|(at, frame)| frame.get() as usize == first.get() as usize + at)
            .count();
        rest = &rest[count..];
        Some((first, count))
    })
}

/// Panics if a frame is named twice. Ascending lists, the usual case, cost one pass.
fn assert_distinct(frames: &[FrameId]) {
    if frames.is_sorted_by(|a, b| a < b) {
        return;
    }
    let mut sorted = frames.to_vec();
    sorted.sort_unstable();
    assert!(sorted.is_sorted_by(|a, b| a < b), "a frame is named twice");
}
