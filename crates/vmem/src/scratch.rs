//! The pager's scratch area: where pages rest on their way out and where fetched pages arrive.
//!
//! It is one reserved range of addresses, divided into windows of [`Scratch::WINDOW_FRAMES`]
//! frames. A frame either holds a page (*present*) or is a hole. The area is registered with a
//! userfaultfd of its own, so that pages can be moved into it; touching a hole would wait for the
//! toucher itself, so presence is tracked here and asserted on every access.

use std::io::{IoSlice, IoSliceMut};
use std::ptr::NonNull;

use farmem_region::{FrameId, Frames, PAGE_SHIFT, PAGE_SIZE};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{AddressRange, Features, Pagemap, Progress, Stop, Uffd, UffdError};

/// Reserved memory made of frames. See the module's text.
#[derive(Debug)]
pub struct Scratch {
    base: NonNull<u8>,
    frames: usize,
    present: Box<[u64]>,
    uffd: Uffd,
}

// SAFETY: the area belongs to this value alone, wherever it is.
unsafe impl Send for Scratch {}

impl Scratch {
    /// Frames in a window; a window is moved into by one call.
    pub const WINDOW_FRAMES: usize = 256;

    /// Reserves `windows` windows of holes.
    ///
    /// # Errors
    /// [`UffdError`] if the range cannot be mapped or registered.
    pub fn new(windows: usize) -> Result<Self, UffdError> {
        let frames = windows * Self::WINDOW_FRAMES;
        let bytes = frames << PAGE_SHIFT;
        let other = |doing| move |errno: rustix::io::Errno| UffdError::Other {
            doing,
            source: errno.into(),
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
        for advice in [
            Advice::LinuxDontFork,
            Advice::LinuxDontDump,
            Advice::LinuxNoHugepage,
        ] {
            // SAFETY: these advices change no contents, and the range is ours. Kernels built
            // without huge pages refuse the last one, which is as good.
            let _ = unsafe { rustix::mm::madvise(base, bytes, advice) };
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(UffdError::Other {
            doing: "reserving the scratch area",
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        })?;
        let uffd = Uffd::new(Features::FaultsOnly)?;
        let scratch =
            Self { base, frames, present: vec![0; frames / 64].into_boxed_slice(), uffd };
        scratch.uffd.register(scratch.range())?;
        Ok(scratch)
    }

    /// The whole area.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        AddressRange::pages_from(self.base.as_ptr() as usize, self.frames)
    }

    /// Number of windows.
    #[must_use]
    pub const fn windows(&self) -> usize {
        self.frames / Self::WINDOW_FRAMES
    }

    /// The userfaultfd of the area. Its faults come from readers of our memory (debuggers,
    /// `mlockall`): answer them with [`Scratch::fill_hole`].
    #[must_use]
    pub const fn uffd(&self) -> &Uffd {
        &self.uffd
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
        source: AddressRange,
        first: FrameId,
        pagemap: &Pagemap,
    ) -> Progress {
        let range = AddressRange::pages_from(self.address(first), source.pages());
        assert!(self.index(first) + source.pages() <= self.frames, "frames past the scratch area");
        // SAFETY: missing pages of the source are answered by the caller; the destination is ours.
        let progress = unsafe { self.uffd.move_pages(range, source.start(), true, false) };
        let base = self.range().start();
        pagemap.present(range, &mut |run| {
            let at = (run.range.start() - base) >> PAGE_SHIFT;
            for index in at..at + run.range.pages() {
                self.present[index / 64] |= 1 << (index % 64);
            }
        });
        progress
    }

    /// Moves `count` present frames into the missing pages at `target` through `uffd`, with which
    /// `target` is registered. The frames become holes as far as it came.
    pub fn move_in(&mut self, uffd: &Uffd, target: usize, first: FrameId, count: usize) -> Progress {
        self.assert_present(first, count);
        let range = AddressRange::pages_from(target, count);
        // SAFETY: the source frames are ours and tracked: they are marked as holes below.
        let progress = unsafe { uffd.move_pages(range, self.address(first), false, true) };
        assert!(progress.stop != Some(Stop::Hole), "a frame believed present is a hole");
        self.mark(first, progress.bytes >> PAGE_SHIFT, false);
        progress
    }

    /// Copies `count` present frames into the missing pages at `target` through `uffd`.
    pub fn copy_in(&self, uffd: &Uffd, target: usize, first: FrameId, count: usize) -> Progress {
        self.assert_present(first, count);
        let range = AddressRange::pages_from(target, count);
        // SAFETY: the source frames are present (asserted) and `&self` keeps them unchanged.
        unsafe { uffd.copy(range, self.address(first) as *const u8, true) }
    }

    /// Gives `count` frames that are holes fresh memory. Returns how many got it.
    pub fn populate(&mut self, first: FrameId, count: usize) -> usize {
        const ZEROS: &[u8; 64 * PAGE_SIZE] = &[0; 64 * PAGE_SIZE];
        let mut done = 0;
        while done < count {
            let frame = offset(first, done);
            let step = (count - done).min(64);
            let range = AddressRange::pages_from(self.address(frame), step);
            // SAFETY: the source is a constant of at least as many bytes.
            let progress = unsafe { self.uffd.copy(range, ZEROS.as_ptr(), true) };
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

    /// Gives the memory of `count` frames back to the system: they become holes.
    pub fn discard(&mut self, first: FrameId, count: usize) {
        let start = self.address(first) as *mut core::ffi::c_void;
        assert!(self.index(first) + count <= self.frames, "frames past the scratch area");
        // SAFETY: the range lies in our own area (asserted), whose holes are tracked: the frames
        // are marked as holes below. The area's userfaultfd does not report removals, so this
        // waits for nobody.
        let result = unsafe { rustix::mm::madvise(start, count << PAGE_SHIFT, Advice::LinuxDontNeed) };
        if result.is_ok() {
            self.mark(first, count, false);
        }
    }

    /// Answers a fault on a hole, which only an outside reader can cause: the frame then holds
    /// zeros that belong to nobody. Returns the frame.
    pub fn fill_hole(&mut self, address: usize) -> Option<FrameId> {
        if !self.range().contains(address) {
            return None;
        }
        let index = (address - self.range().start()) >> PAGE_SHIFT;
        let frame = FrameId::new(u32::try_from(index).ok()?);
        if self.is_present(frame) {
            self.uffd.wake(AddressRange::pages_from(address, 1));
            return None;
        }
        (self.populate(frame, 1) == 1).then_some(frame)
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
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let start = self.base.as_ptr().cast::<core::ffi::c_void>();
        // SAFETY: the mapping is ours, made in `new`, and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(start, self.frames << PAGE_SHIFT) };
    }
}

impl Frames for Scratch {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        assert!(self.is_present(frame), "frame {frame} is a hole");
        let address = self.address(frame) as *const [u8; PAGE_SIZE];
        // SAFETY: the frame lies in our mapping, holds a page (asserted), is page-aligned, and
        // `&self` excludes writers.
        unsafe { &*address }
    }

    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        assert!(self.is_present(frame), "frame {frame} is a hole");
        let address = self.address(frame) as *mut [u8; PAGE_SIZE];
        // SAFETY: as in `bytes`, and `&mut self` excludes every other access.
        unsafe { &mut *address }
    }

    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<IoSliceMut<'a>>) {
        for (first, count) in runs(frames) {
            self.assert_present(first, count);
            let address = self.address(first) as *mut u8;
            // SAFETY: present frames of our mapping (asserted); runs never overlap because a
            // frame named twice would have to appear in two runs, which the check below excludes.
            let slice = unsafe { std::slice::from_raw_parts_mut(address, count << PAGE_SHIFT) };
            slices.push(IoSliceMut::new(slice));
        }
        assert_distinct(frames);
    }

    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<IoSlice<'a>>) {
        for (first, count) in runs(frames) {
            self.assert_present(first, count);
            let address = self.address(first) as *const u8;
            // SAFETY: present frames of our mapping (asserted); `&self` excludes writers.
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
