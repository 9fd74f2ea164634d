//! The arena: memory of a memory server in slots of one page, over a memfd that a client on the
//! same machine can be given and a device can register.
//!
//! A [`Slot`] is a token for one page of the arena, as a `Box` is for one page of the heap: who
//! has the only token may change the page, who has one of several may read it. Tokens are 8
//! bytes, have no destructor, and go back by [`Arena::release`].
//!
//! ```text
//! chunks (2 MiB)   |  chunk 0  |  chunk 1  |  chunk 2  |  chunk 3  | ...
//!                    some free   returned    all free    untouched
//! ```
//!
//! Free slots are tracked in chunks, so that memory goes back to the system in large pieces and
//! slots taken together lie side by side (one buffer for many pages).

use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use farmem_region::PAGE_SIZE;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Slots of a chunk: 2 MiB, what the system gives and takes back cheaply.
const CHUNK_SLOTS: u32 = 512;
const CHUNK_WORDS: usize = (CHUNK_SLOTS / u64::BITS) as usize;
const CHUNK_BYTES: u64 = CHUNK_SLOTS as u64 * PAGE_SIZE as u64;

/// Free memory that is kept for the next writes, 32 MiB: giving it back and touching it anew
/// costs more than the write itself.
const KEPT_FREE_SLOTS: u32 = 16 * CHUNK_SLOTS;

/// Tells the slots of one arena from those of another one in the same process.
static NEXT_TAG: AtomicU32 = AtomicU32::new(1);

/// One page of an arena, as a token.
#[derive(Debug)]
#[must_use = "a slot that is dropped is never free again"]
pub struct Slot {
    number: u32,
    /// Not zero, so that an absent slot takes no more room than a slot.
    tag: NonZeroU32,
}

impl Slot {
    /// The slot's position in the arena, in pages.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }
}

/// Memory in slots of one page.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    slots: u32,
    tag: NonZeroU32,
    file: OwnedFd,
    /// Tokens of each slot beyond the first one.
    sharers: Box<[AtomicU32]>,
    free: Mutex<FreeSlots>,
}

// SAFETY: the mapping belongs to the arena and is not bound to a thread; `&Arena` gives a page's
// bytes only in exchange for borrows of its token, see `bytes` and `bytes_mut`.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

#[derive(Debug)]
struct FreeSlots {
    chunks: Vec<Chunk>,
    /// Chunks with free slots that have memory; the last one is used first.
    open: Vec<u32>,
    /// Chunks without memory that had some.
    returned: Vec<u32>,
    /// The first chunk that was never used.
    untouched: u32,
    /// Slots that have a token.
    taken: u32,
    /// Free slots of chunks that have memory.
    kept: u32,
    /// Whether a chunk is given blocks in the file before it is used.
    allocates: bool,
}

#[derive(Debug, Clone)]
struct Chunk {
    free: [u64; CHUNK_WORDS],
    free_count: u32,
    /// Whether the chunk is in `FreeSlots::open`.
    open: bool,
}

/// Bytes that a processor brings near at a time.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE_BYTES: usize = 64;

impl Arena {
    /// Reserves room for `slots` pages. Costs memory only as they are written.
    ///
    /// # Errors
    /// If the memfd cannot be made, sized, sealed or mapped.
    pub fn new(slots: u32) -> io::Result<Self> {
        let bytes = Self::file_bytes(slots);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("farmem-arena", flags)?;
        rustix::fs::ftruncate(&file, bytes)?;
        // Who maps it relies on its never becoming shorter.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::over(file, slots, false)
    }

    /// Bytes of the file of an arena of `slots` pages.
    #[must_use]
    pub const fn file_bytes(slots: u32) -> u64 {
        slots.div_ceil(CHUNK_SLOTS) as u64 * CHUNK_BYTES
    }

    /// An arena in a file of [`Arena::file_bytes`], which nobody else shortens or writes. All slots
    /// are free; those that are not are named by [`Arena::restore`] before any is taken.
    ///
    /// `allocates` says that the file system may run out of room: then a chunk is used only once
    /// the file has blocks for it.
    ///
    /// # Errors
    /// If the file cannot be mapped.
    pub fn over(file: OwnedFd, slots: u32, allocates: bool) -> io::Result<Self> {
        let chunks = slots.div_ceil(CHUNK_SLOTS);
        let base = map_shared(&file, Self::file_bytes(slots))?;
        let full = Chunk { free: [u64::MAX; CHUNK_WORDS], free_count: CHUNK_SLOTS, open: false };
        let free = FreeSlots {
            chunks: vec![full; chunks as usize],
            open: Vec::new(),
            returned: Vec::new(),
            untouched: 0,
            taken: 0,
            kept: 0,
            allocates,
        };
        Ok(Self {
            base,
            slots: chunks * CHUNK_SLOTS,
            tag: NonZeroU32::new(NEXT_TAG.fetch_add(1, Ordering::Relaxed))
                .unwrap_or(NonZeroU32::MAX),
            file,
            // SAFETY: all bytes zero is a valid AtomicU32. Zeroed memory costs nothing yet.
            sharers: unsafe {
                Box::new_zeroed_slice((chunks * CHUNK_SLOTS) as usize).assume_init()
            },
            free: Mutex::new(free),
        })
    }

    /// The memfd, to pass to a client on the same machine.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Slots there are.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.slots
    }

    /// Slots that have a token.
    #[must_use]
    pub fn taken(&self) -> u32 {
        self.free().taken
    }

    /// Takes `count` slots, of undefined content: all of them, or none and returns false.
    pub fn take(&self, count: u32, slots: &mut Vec<Slot>) -> bool {
        self.take_leaving(0, count, slots)
    }

    /// As [`Arena::take`], but only if `rest` slots are still free afterwards: for others, who need
    /// them more.
    pub fn take_leaving(&self, rest: u32, count: u32, slots: &mut Vec<Slot>) -> bool {
        let mut free = self.free();
        if self.slots - free.taken < count.saturating_add(rest) || !free.keep(count, &self.file) {
            return false;
        }
        free.taken += count;
        slots.extend((0..count).map(|_| Slot { number: free.pop(), tag: self.tag }));
        true
    }

    /// As [`Arena::take_leaving`], but only slots that have memory already, of which `kept_rest` are still
    /// free afterwards, or all that are free have memory.
    pub fn take_kept(&self, rest: u32, kept_rest: u32, count: u32, slots: &mut Vec<Slot>) -> bool {
        let mut free = self.free();
        let all = self.slots - free.taken;
        if free.kept < count.saturating_add(kept_rest).min(all) || all < count.saturating_add(rest)
        {
            return false;
        }
        free.taken += count;
        slots.extend((0..count).map(|_| Slot { number: free.pop(), tag: self.tag }));
        true
    }

    /// Sees to it that so many free slots count as having memory, or all there are. False if the file
    /// system has no room.
    pub fn keep_free(&self, count: u32) -> bool {
        let mut free = self.free();
        let count = count.min(self.slots - free.taken);
        while !free.allocates && free.kept < count {
            free.open_another();
        }
        free.keep(count, &self.file)
    }

    /// A token for a slot whose content is from before, to be counted by [`Arena::restore`]. `None` if
    /// there is no such slot.
    #[must_use]
    pub fn adopt(&self, number: u32) -> Option<Slot> {
        (number < self.slots).then_some(Slot { number, tag: self.tag })
    }

    /// Says how many tokens each slot has, before any was taken. Slots that are not named have none.
    ///
    /// # Errors
    /// If the kernel does not say which chunks have memory.
    pub fn restore(&self, tokens: impl Iterator<Item = (u32, u32)>) -> io::Result<()> {
        let mut free = self.free();
        assert!(free.taken == 0 && free.untouched == 0, "the arena is in use");
        for (number, count) in tokens.filter(|(_, count)| *count > 0) {
            self.sharers[number as usize].store(count - 1, Ordering::Relaxed);
            let chunk = &mut free.chunks[(number / CHUNK_SLOTS) as usize];
            let at = number % CHUNK_SLOTS;
            chunk.free[(at / u64::BITS) as usize] &= !(1 << (at % u64::BITS));
            chunk.free_count -= 1;
            free.taken += 1;
        }
        free.untouched = self.slots / CHUNK_SLOTS;
        for id in (0..free.untouched).rev() {
            let free_count = free.chunks[id as usize].free_count;
            if free_count == CHUNK_SLOTS && !has_memory(&self.file, id)? {
                free.returned.push(id);
            } else if free_count > 0 {
                free.chunks[id as usize].open = true;
                free.open.push(id);
                free.kept += free_count;
            }
        }
        Ok(())
    }

    /// A second token for the same slot: until one of them is released the page cannot change.
    pub fn share(&self, slot: &Slot) -> Slot {
        self.check(slot);
        self.sharers[slot.number as usize].fetch_add(1, Ordering::Relaxed);
        Slot { ..*slot }
    }

    /// Tokens that there are for the slot. Others may give theirs back meanwhile; who knows that
    /// nobody else can get one from it may rely on the answer 1.
    #[must_use]
    pub fn tokens(&self, slot: &Slot) -> u32 {
        self.check(slot);
        self.sharers[slot.number as usize].load(Ordering::Acquire) + 1
    }

    /// Gives tokens back. A slot whose last token this is becomes free.
    pub fn release(&self, slots: impl IntoIterator<Item = Slot>) {
        let mut free = None;
        for slot in slots {
            self.check(&slot);
            if self.drop_token(&slot) {
                free.get_or_insert_with(|| self.free()).push(slot.number);
            }
        }
    }

    /// Whether the token was the slot's last one.
    fn drop_token(&self, slot: &Slot) -> bool {
        let sharers = &self.sharers[slot.number as usize];
        // Acquire and release order all uses through other tokens before the slot's next use.
        sharers
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1))
            .is_err()
    }

    /// The page's bytes. If a client has been given the arena's file, it may change them
    /// meanwhile: then copy them before believing them.
    #[must_use]
    pub fn bytes<'a>(&'a self, slot: &'a Slot) -> &'a [u8; PAGE_SIZE] {
        self.check(slot);
        // SAFETY: the page lies in the mapping (checked), which lives as long as `self`. While the
        // token is borrowed nobody in this process changes the page: that takes `&mut` of the
        // only token.
        unsafe { &*self.page(slot.number).as_ptr() }
    }

    /// Asks the processor to bring the page near, as its bytes will be read in a moment.
    pub fn prefetch(&self, slot: &Slot) {
        self.check(slot);
        #[cfg(target_arch = "x86_64")]
        for line in (0..PAGE_SIZE).step_by(CACHE_LINE_BYTES) {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            let at = self.page(slot.number).cast::<i8>().as_ptr().wrapping_add(line);
            // SAFETY: a prefetch reads nothing that the program could see, and the address lies in
            // the mapping (checked).
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at) };
        }
    }

    /// The page's bytes, to fill.
    ///
    /// # Panics
    /// If there is another token for the slot.
    #[must_use]
    pub fn bytes_mut<'a>(&'a self, slot: &'a mut Slot) -> &'a mut [u8; PAGE_SIZE] {
        self.check_unshared(slot);
        // SAFETY: the page lies in the mapping (checked), which lives as long as `self`; its only
        // token is mutably borrowed.
        unsafe { &mut *self.page(slot.number).as_ptr() }
    }

    /// Appends buffers that together cover the slots in their order; neighbours share one.
    pub fn gather<'a>(&'a self, slots: &'a [Slot], slices: &mut Vec<IoSlice<'a>>) {
        for run in slots.chunk_by(|slot, next| next.number == slot.number + 1) {
            run.iter().for_each(|slot| self.check(slot));
            let first = self.page(run[0].number).cast::<u8>();
            // SAFETY: as in `bytes`, for pages that lie side by side.
            let bytes =
                unsafe { std::slice::from_raw_parts(first.as_ptr(), run.len() * PAGE_SIZE) };
            slices.push(IoSlice::new(bytes));
        }
    }

    /// As [`Arena::gather`], to fill.
    ///
    /// # Panics
    /// If there is another token for one of the slots.
    pub fn gather_mut<'a>(&'a self, slots: &'a mut [Slot], slices: &mut Vec<IoSliceMut<'a>>) {
        for run in slots.chunk_by_mut(|slot, next| next.number == slot.number + 1) {
            run.iter().for_each(|slot| self.check_unshared(slot));
            let first = self.page(run[0].number).cast::<u8>();
            // SAFETY: as in `bytes_mut`, for pages that lie side by side; each page has one token
            // only, so no two runs overlap.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), run.len() * PAGE_SIZE) };
            slices.push(IoSliceMut::new(bytes));
        }
    }

    /// Copies a page out. Sound and meaningful even while a client that has the file changes the
    /// page: what was copied is what is then looked at.
    pub fn copy_out(&self, slot: &Slot, page: &mut [u8; PAGE_SIZE]) {
        self.check(slot);
        let from = self.page(slot.number).as_ptr();
        // SAFETY: both are whole pages, one in the mapping and one on our side, and never the
        // same. No reference to the shared page is made.
        unsafe { std::ptr::copy_nonoverlapping(from, page, 1) };
    }

    /// Gives one chunk that is free, and not worth keeping, back to the system. Returns whether
    /// there may be more.
    ///
    /// # Errors
    /// If the kernel does not punch the hole; the chunk stays as it was.
    pub fn give_back_chunk(&self) -> io::Result<bool> {
        let Some(chunk) = self.free().withdraw_free_chunk() else {
            return Ok(false);
        };
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let at = u64::from(chunk) * CHUNK_BYTES;
        let punched = rustix::fs::fallocate(&self.file, mode, at, CHUNK_BYTES);
        let mut free = self.free();
        match punched {
            Ok(()) => free.returned.push(chunk),
            Err(_) => free.open(chunk),
        }
        drop(free);
        Ok(punched.map(|()| true)?)
    }

    fn free(&self) -> MutexGuard<'_, FreeSlots> {
        // Each change under the lock is whole before anything can panic.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const fn page(&self, number: u32) -> NonNull<[u8; PAGE_SIZE]> {
        // SAFETY: `check` has found the slot to be in the mapping.
        unsafe { self.base.add(number as usize * PAGE_SIZE).cast() }
    }

    fn check(&self, slot: &Slot) {
        assert!(slot.tag == self.tag, "the slot is of another arena");
        debug_assert!(slot.number < self.slots);
    }

    fn check_unshared(&self, slot: &Slot) {
        self.check(slot);
        let sharers = self.sharers[slot.number as usize].load(Ordering::Acquire);
        assert!(sharers == 0, "a shared slot must not change");
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let bytes = self.slots as usize * PAGE_SIZE;
        // SAFETY: the mapping is ours, and no borrow of a page outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), bytes) };
    }
}

impl FreeSlots {
    /// Takes a free slot. The caller has seen that there is one.
    fn pop(&mut self) -> u32 {
        let id = match self.open.last() {
            Some(id) => *id,
            None => self.open_another(),
        };
        let chunk = &mut self.chunks[id as usize];
        let word = chunk.free.iter().position(|word| *word != 0).expect("an open chunk has room");
        let bit = chunk.free[word].trailing_zeros();
        chunk.free[word] &= chunk.free[word] - 1;
        chunk.free_count -= 1;
        self.kept -= 1;
        if chunk.free_count == 0 {
            chunk.open = false;
            self.open.pop();
        }
        id * CHUNK_SLOTS + word as u32 * u64::BITS + bit
    }

    /// Sees to it that so many free slots have blocks in the file; false if there are none to be had.
    fn keep(&mut self, count: u32, file: &OwnedFd) -> bool {
        while self.allocates && self.kept < count {
            let id = self.another();
            let at = u64::from(id) * CHUNK_BYTES;
            let flags = FallocateFlags::empty();
            if rustix::fs::fallocate(file, flags, at, CHUNK_BYTES).is_err() {
                self.returned.push(id);
                return false;
            }
            self.open(id);
        }
        true
    }

    fn another(&mut self) -> u32 {
        self.returned.pop().unwrap_or_else(|| {
            self.untouched += 1;
            self.untouched - 1
        })
    }

    fn open_another(&mut self) -> u32 {
        let id = self.another();
        self.open(id);
        id
    }

    /// A chunk that is all free becomes one to take slots from.
    fn open(&mut self, id: u32) {
        self.chunks[id as usize].open = true;
        self.open.push(id);
        self.kept += CHUNK_SLOTS;
    }

    fn push(&mut self, number: u32) {
        let (id, at) = (number / CHUNK_SLOTS, number % CHUNK_SLOTS);
        let chunk = &mut self.chunks[id as usize];
        let bit = 1 << (at % u64::BITS);
        let word = &mut chunk.free[(at / u64::BITS) as usize];
        assert!(*word & bit == 0, "slot {number} is released twice");
        *word |= bit;
        chunk.free_count += 1;
        self.taken -= 1;
        self.kept += 1;
        if !chunk.open {
            chunk.open = true;
            self.open.push(id);
        }
    }

    /// Takes a chunk that is all free out of use, unless little is kept.
    fn withdraw_free_chunk(&mut self) -> Option<u32> {
        if self.kept < KEPT_FREE_SLOTS + CHUNK_SLOTS {
            return None;
        }
        let is_free = |id: &u32| self.chunks[*id as usize].free_count == CHUNK_SLOTS;
        let at = self.open.iter().position(is_free)?;
        let id = self.open.swap_remove(at);
        self.chunks[id as usize].open = false;
        self.kept -= CHUNK_SLOTS;
        Some(id)
    }
}

/// Whether any part of a chunk has memory.
fn has_memory(file: &OwnedFd, chunk: u32) -> io::Result<bool> {
    let start = u64::from(chunk) * CHUNK_BYTES;
    match rustix::fs::seek(file, SeekFrom::Data(start)) {
        Ok(at) => Ok(at < start + CHUNK_BYTES),
        Err(Errno::NXIO) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Maps the file, kept out of forked children and core dumps.
fn map_shared(file: &OwnedFd, bytes: u64) -> io::Result<NonNull<u8>> {
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let base =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, flags, file, 0) }?;
    for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
        // SAFETY: the range is the mapping just made; neither advice changes what it holds.
        unsafe { rustix::mm::madvise(base, length, advice) }?;
    }
    NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(arena: &Arena, count: u32) -> Vec<Slot> {
        let mut slots = Vec::new();
        assert!(arena.take(count, &mut slots));
        slots
    }

    #[test]
    fn slots_without_memory_are_taken_only_if_that_is_said() {
        let arena = Arena::new(4 * CHUNK_SLOTS).unwrap();
        assert!(!arena.take_kept(0, 0, 1, &mut Vec::new()));
        let mut slots = take(&arena, 10);
        assert!(
            arena.take_kept(0, 0, CHUNK_SLOTS - 10, &mut slots),
            "a chunk has memory as a whole"
        );
        assert!(!arena.take_kept(0, 0, 1, &mut slots));
        arena.release(slots.drain(..10));
        assert!(
            !arena.take_kept(3 * CHUNK_SLOTS + 1, 0, 10, &mut slots),
            "leaving more than there is"
        );
        assert!(!arena.take_kept(0, 1, 10, &mut slots), "the same of those with memory");
        assert!(arena.take_kept(3 * CHUNK_SLOTS, 0, 10, &mut slots));
        assert!(slots.iter().all(|slot| slot.number() < CHUNK_SLOTS));
        assert!(arena.keep_free(1) && arena.take_kept(0, CHUNK_SLOTS - 1, 1, &mut slots));
        assert!(!arena.take_kept(0, CHUNK_SLOTS - 1, 1, &mut slots), "no more than asked for");
        assert!(arena.keep_free(u32::MAX));
        assert!(arena.take_kept(0, u32::MAX, 1, &mut slots), "there is nothing that has none");
        arena.release(slots);
    }

    #[test]
    fn slots_are_unique_and_come_back() {
        let arena = Arena::new(2 * CHUNK_SLOTS).unwrap();
        let slots = take(&arena, 2 * CHUNK_SLOTS);
        let mut numbers: Vec<_> = slots.iter().map(Slot::number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 2 * CHUNK_SLOTS as usize);
        assert!(!arena.take(1, &mut Vec::new()));
        arena.release(slots);
        assert_eq!(arena.taken(), 0);
        arena.release(take(&arena, 2 * CHUNK_SLOTS));
    }

    #[test]
    fn neighbours_share_a_buffer() {
        let arena = Arena::new(CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 64);
        let mut slices = Vec::new();
        arena.gather_mut(&mut slots, &mut slices);
        assert_eq!(slices.iter().map(|slice| slice.len()).collect::<Vec<_>>(), [64 * PAGE_SIZE]);
        arena.release(slots);
    }

    #[test]
    fn a_shared_slot_is_free_only_after_its_last_token() {
        let arena = Arena::new(CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 1);
        arena.bytes_mut(&mut slots[0]).fill(7);
        let second = arena.share(&slots[0]);
        arena.release(slots);
        assert_eq!(arena.taken(), 1);
        assert_eq!(arena.bytes(&second)[4095], 7);
        arena.release([second]);
        assert_eq!(arena.taken(), 0);
    }

    #[test]
    #[should_panic(expected = "a shared slot must not change")]
    fn a_shared_slot_cannot_be_changed() {
        let arena = Arena::new(CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 1);
        let _second = arena.share(&slots[0]);
        let _ = arena.bytes_mut(&mut slots[0]);
    }

    #[test]
    #[should_panic(expected = "of another arena")]
    fn a_slot_of_another_arena_is_not_accepted() {
        let (one, other) = (Arena::new(1).unwrap(), Arena::new(1).unwrap());
        let slots = take(&one, 1);
        let _ = other.bytes(&slots[0]);
    }

    #[test]
    fn free_memory_goes_back_to_the_system() {
        let arena = Arena::new(40 * CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 40 * CHUNK_SLOTS);
        for slot in &mut slots {
            arena.bytes_mut(slot)[0] = 1;
        }
        arena.release(slots);
        let blocks = || rustix::fs::fstat(&arena.file).unwrap().st_blocks as u64 * 512;
        assert_eq!(blocks(), 40 * CHUNK_BYTES);
        while arena.give_back_chunk().unwrap() {}
        assert_eq!(blocks(), u64::from(KEPT_FREE_SLOTS) * PAGE_SIZE as u64);
        let slots = take(&arena, 40 * CHUNK_SLOTS);
        assert!(slots.iter().any(|slot| *arena.bytes(slot) == [0; PAGE_SIZE]));
        arena.release(slots);
    }

    #[test]
    fn slots_outlive_their_arena_in_its_file() {
        let arena = Arena::new(4 * CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 700);
        for slot in &mut slots {
            let number = slot.number() as u8;
            arena.bytes_mut(slot).fill(number);
        }
        let file = arena.file.try_clone().unwrap();
        drop(arena);
        let arena = Arena::over(file, 4 * CHUNK_SLOTS, true).unwrap();
        let numbers: Vec<u32> = slots.iter().map(Slot::number).step_by(2).collect();
        let mut kept: Vec<_> = numbers.iter().map(|at| arena.adopt(*at).unwrap()).collect();
        arena.restore(numbers.iter().map(|at| (*at, 2))).unwrap();
        assert_eq!((arena.taken(), arena.tokens(&kept[3])), (350, 2));
        let others = take(&arena, 4 * CHUNK_SLOTS - 350);
        assert!(others.iter().all(|slot| !numbers.contains(&slot.number())));
        assert!(!arena.take(1, &mut Vec::new()));
        arena.release(numbers.iter().map(|at| arena.adopt(*at).unwrap()));
        assert!(kept.iter().all(|slot| *arena.bytes(slot) == [slot.number() as u8; PAGE_SIZE]));
        kept.extend(others);
        arena.release(kept);
        assert_eq!(arena.taken(), 0);
    }

    #[test]
    fn who_has_the_file_sees_what_is_stored_and_cannot_shrink_it() {
        let arena = Arena::new(CHUNK_SLOTS).unwrap();
        let mut slots = take(&arena, 2);
        arena.bytes_mut(&mut slots[1]).fill(9);
        let at = u64::from(slots[1].number()) * PAGE_SIZE as u64;
        let mut page = [0; PAGE_SIZE];
        rustix::io::pread(arena.descriptor(), &mut page, at).unwrap();
        assert_eq!(page, [9; PAGE_SIZE]);
        rustix::io::pwrite(arena.descriptor(), &[3; PAGE_SIZE], at).unwrap();
        arena.copy_out(&slots[1], &mut page);
        assert_eq!(page, [3; PAGE_SIZE]);
        assert!(rustix::fs::ftruncate(arena.descriptor(), 0).is_err());
        arena.release(slots);
    }
}
