//! The pager's heap: dlmalloc over chunks of its own memory. It serves Rust's allocations and, under
//! the C library's names, those of the static C library, whose own allocator would move the
//! program's break.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dlmalloc::{Allocator, Dlmalloc};

use super::memory::{self, PAGE_BYTES, Presence};

/// The smallest chunk. A pager of a small program fits in a few.
const CHUNK_BYTES_MIN: usize = 1 << 20;

/// A chunk is this part of what the heap has, so that the number of chunks grows with the
/// logarithm of the heap and at most an eighth of it is resident in vain.
const CHUNK_PART: usize = 8;

/// What C's `malloc` promises, and dlmalloc gives.
const NATURAL_ALIGNMENT: usize = 2 * size_of::<usize>();

/// Where dlmalloc gets its memory. It is never given back.
struct Chunks;

// SAFETY: each chunk is fresh zeroed memory that nobody else uses, aligned to a page.
unsafe impl Allocator for Chunks {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let bytes = size.max(CHUNK_BYTES_MIN).max(heap_bytes() / CHUNK_PART);
        match memory::map(bytes, Presence::Now) {
            Ok(chunk) => {
                HEAP_BYTES.fetch_add(chunk.len(), std::sync::atomic::Ordering::Relaxed);
                (chunk.as_ptr().cast(), chunk.len(), 0)
            }
            Err(_) => (std::ptr::null_mut(), 0, 0),
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        std::ptr::null_mut()
    }

    fn free_part(&self, _: *mut u8, _: usize, _: usize) -> bool {
        false
    }

    fn free(&self, _: *mut u8, _: usize) -> bool {
        false
    }

    fn can_release_part(&self, _: u32) -> bool {
        false
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE_BYTES
    }
}

static HEAP: Mutex<Dlmalloc<Chunks>> = Mutex::new(Dlmalloc::new_with_allocator(Chunks));
static HEAP_BYTES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Bytes that the heap has, in use or not.
pub(crate) fn heap_bytes() -> usize {
    HEAP_BYTES.load(std::sync::atomic::Ordering::Relaxed)
}

fn heap() -> MutexGuard<'static, Dlmalloc<Chunks>> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rust's view of the heap.
struct Heap;

#[global_allocator]
static GLOBAL: Heap = Heap;

// SAFETY: dlmalloc keeps the contract of `GlobalAlloc`, for which its methods are made; the lock
// makes it exclusive.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: no preconditions beyond those of the caller.
        unsafe { heap().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { heap().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller passes what `alloc` gave with the same layout.
        unsafe { heap().free(pointer, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { heap().realloc(pointer, layout.size(), layout.align(), bytes) }
    }
}

const ENOMEM: c_int = libc::ENOMEM;

fn or_no_memory(pointer: *mut u8) -> *mut c_void {
    if pointer.is_null() {
        // SAFETY: the calling thread's own `errno`.
        unsafe { *libc::__errno_location() = ENOMEM };
    }
    pointer.cast()
}

/// # Safety
/// None: declared as the standard library does.
#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(bytes: usize) -> *mut c_void {
    // SAFETY: any size is accepted.
    or_no_memory(unsafe { heap().c_malloc(bytes) })
}

/// # Safety
/// None: declared as the standard library does.
#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: usize, bytes: usize) -> *mut c_void {
    let Some(all) = count.checked_mul(bytes) else {
        return or_no_memory(std::ptr::null_mut());
    };
    // SAFETY: any size is accepted.
    or_no_memory(unsafe { heap().calloc(all, NATURAL_ALIGNMENT) })
}

/// # Safety
/// As C's: `pointer` is null or from this heap and in use.
#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(pointer: *mut c_void, bytes: usize) -> *mut c_void {
    // SAFETY: the caller's promise.
    or_no_memory(unsafe { heap().c_realloc(pointer.cast(), bytes) })
}

/// # Safety
/// As C's: `pointer` is null or from this heap and in use.
#[unsafe(no_mangle)]
unsafe extern "C" fn free(pointer: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { heap().c_free(pointer.cast()) };
}

#[unsafe(no_mangle)]
extern "C" fn memalign(alignment: usize, bytes: usize) -> *mut c_void {
    if !alignment.is_power_of_two() {
        return or_no_memory(std::ptr::null_mut());
    }
    // SAFETY: the alignment is a power of two.
    or_no_memory(unsafe { heap().c_memalign(alignment, bytes) })
}

#[unsafe(no_mangle)]
extern "C" fn aligned_alloc(alignment: usize, bytes: usize) -> *mut c_void {
    memalign(alignment, bytes)
}

/// # Safety
/// As C's: `place` can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(
    place: *mut *mut c_void,
    alignment: usize,
    bytes: usize,
) -> c_int {
    if !alignment.is_power_of_two() || alignment < size_of::<usize>() {
        return libc::EINVAL;
    }
    // SAFETY: the alignment is a power of two.
    let pointer = unsafe { heap().c_memalign(alignment, bytes) };
    if pointer.is_null() {
        return ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { place.write(pointer.cast()) };
    0
}

/// glibc's static start-up gets the first thread's control block here, by default from the break,
/// which is the program's. Relocations by indirect functions are not applied yet and there is no
/// thread pointer: only system calls and atomics may be used.
#[unsafe(no_mangle)]
extern "C" fn _dl_early_allocate(bytes: usize) -> *mut c_void {
    match memory::map(bytes, Presence::Now) {
        Ok(block) => block.as_ptr().cast(),
        Err(_) => std::ptr::null_mut(),
    }
}
