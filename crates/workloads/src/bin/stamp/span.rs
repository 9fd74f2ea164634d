//! Memory that one thread stamps: chunks, each a mapping of its own, with the word that every
//! page must hold. All that touches the kernel or a raw pointer is here.

use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farmem_workloads::content::Dice;
use farmem_workloads::{PAGE_BYTES, PAGE_WORDS};

/// Pages of one chunk: small enough that chunks come and go often, large enough that runs of
/// pages form.
pub(crate) const CHUNK_PAGES: usize = 256;
const CHUNK_BYTES: usize = CHUNK_PAGES * PAGE_BYTES;

/// The words of a page that carry its stamp, written in this order and read in the reverse one.
/// The rest of a page stays zero.
pub(crate) const STAMPED_WORDS: [usize; 4] = [0, 1, 171, PAGE_WORDS - 1];

/// What a page must hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Zero: never written, or given back.
    Zero,
    /// The stamp of this version.
    Version(u32),
    /// Given to the kernel with MADV_FREE: the stamp of this version, or zero.
    VersionOrZero(u32),
}

/// A word of a page that is not what was written there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrongWord {
    pub(crate) page: usize,
    pub(crate) word: usize,
    pub(crate) address: usize,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

impl std::fmt::Display for WrongWord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { page, word, address, expected, found } = self;
        write!(
            f,
            "wrong byte: page {page} word {word} at {address:#x}: expected {expected:#018x}, \
             found {found:#018x} (a stamp is owner, page, version: 8, 24, 32 bits)"
        )
    }
}

impl std::error::Error for WrongWord {}

/// Mapped chunks of one owner; whoever shares them may look while the owner writes.
pub(crate) struct Memory {
    owner: u64,
    chunks: Vec<*mut c_void>,
}

// SAFETY: the pointers are to mappings that only this value unmaps, and every access to their
// content is atomic.
unsafe impl Send for Memory {}
// SAFETY: as above; moving and unmapping chunks needs `&mut`.
unsafe impl Sync for Memory {}

impl Memory {
    const fn pages(&self) -> usize {
        self.chunks.len() * CHUNK_PAGES
    }

    fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages() && word < PAGE_WORDS);
        let bytes = (page % CHUNK_PAGES) * PAGE_BYTES + word * size_of::<u64>();
        let chunk = self.chunks[page / CHUNK_PAGES];
        // SAFETY: the chunk is mapped as long as `self` holds it, the offset lies inside (asserted),
        // mappings are page-aligned, so the word is aligned, and all access to it is atomic.
        unsafe { AtomicU64::from_ptr(chunk.byte_add(bytes).cast()) }
    }

    const fn stamp(&self, page: usize, version: u32) -> u64 {
        self.owner << 56 | (page as u64) << 32 | version as u64
    }

    /// Looks at a random page that its owner may be writing now: the words are written first to
    /// last, so read last to first the versions never fall.
    pub(crate) fn look(&self, dice: &mut Dice) -> Result<(), WrongWord> {
        let page = dice.below(self.pages() as u64) as usize;
        let mut before = 0;
        for word in STAMPED_WORDS.into_iter().rev() {
            let found = self.word(page, word).load(Ordering::Acquire);
            let foreign = found != 0 && found >> 32 != self.stamp(page, 0) >> 32;
            if foreign || found < before {
                return Err(self.wrong(page, word, before, found));
            }
            before = found;
        }
        Ok(())
    }

    fn wrong(&self, page: usize, word: usize, expected: u64, found: u64) -> WrongWord {
        let address = self.word(page, word).as_ptr() as usize;
        WrongWord { page, word, address, expected, found }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            // SAFETY: the chunk is ours and nobody holds a pointer into it after this.
            unsafe { libc::munmap(*chunk, CHUNK_BYTES) };
        }
    }
}

/// Memory and what its owner knows of it.
pub(crate) struct Span {
    memory: Arc<Memory>,
    expected: Vec<Expected>,
    clock: u32,
}

impl Span {
    /// Maps `chunks` chunks for `owner`, all zero.
    pub(crate) fn map(owner: u8, chunks: usize) -> io::Result<Self> {
        let mapped = (0..chunks).map(|_| map_chunk()).collect::<io::Result<_>>()?;
        let memory = Arc::new(Memory { owner: u64::from(owner), chunks: mapped });
        let expected = vec![Expected::Zero; chunks * CHUNK_PAGES];
        Ok(Self { memory, expected, clock: 0 })
    }

    /// For others to look at. What is shared stays where it is: no deed moves or unmaps it.
    pub(crate) fn share(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    fn chunk_mut(&mut self, chunk: usize) -> &mut *mut c_void {
        let memory = Arc::get_mut(&mut self.memory).expect("shared memory is never moved");
        &mut memory.chunks[chunk]
    }

    pub(crate) const fn pages(&self) -> usize {
        self.expected.len()
    }

    pub(crate) const fn chunks(&self) -> usize {
        self.pages() / CHUNK_PAGES
    }

    /// Writes the next version to `page`.
    pub(crate) fn write(&mut self, page: usize) {
        self.clock += 1;
        let stamp = self.memory.stamp(page, self.clock);
        for word in STAMPED_WORDS {
            self.memory.word(page, word).store(stamp, Ordering::Release);
        }
        self.expected[page] = Expected::Version(self.clock);
    }

    /// Checks the stamp of `page` and one word beside it.
    pub(crate) fn check(&self, page: usize, blank: usize) -> Result<(), WrongWord> {
        let (stamp, or_zero) = match self.expected[page] {
            Expected::Zero => (0, true),
            Expected::Version(version) => (self.memory.stamp(page, version), false),
            Expected::VersionOrZero(version) => (self.memory.stamp(page, version), true),
        };
        for word in STAMPED_WORDS {
            let found = self.memory.word(page, word).load(Ordering::Acquire);
            if found != stamp && !(or_zero && found == 0) {
                return Err(self.memory.wrong(page, word, stamp, found));
            }
        }
        let found = self.memory.word(page, blank).load(Ordering::Acquire);
        if !STAMPED_WORDS.contains(&blank) && found != 0 {
            return Err(self.memory.wrong(page, blank, 0, found));
        }
        Ok(())
    }

    /// A number that any change of any stamp changes. Of what was freed lazily the kernel may
    /// have taken some and not other: that counts as zero.
    pub(crate) fn digest(&self) -> u64 {
        let stamps = (0..self.pages()).map(|page| match self.expected[page] {
            Expected::Zero | Expected::VersionOrZero(_) => 0,
            Expected::Version(_) => self.memory.word(page, 0).load(Ordering::Acquire),
        });
        stamps.fold(0, |sum: u64, stamp| sum.rotate_left(7).wrapping_add(stamp))
    }

    /// Gives the run of pages back: it must read as zero from now on.
    pub(crate) fn give_back(&mut self, first: usize, pages: usize) -> io::Result<()> {
        self.advise(first, pages, libc::MADV_DONTNEED)?;
        self.expected[first..first + pages].fill(Expected::Zero);
        Ok(())
    }

    /// Lets the kernel take the run of pages when it likes, until they are written again.
    pub(crate) fn free_lazily(&mut self, first: usize, pages: usize) -> io::Result<()> {
        self.advise(first, pages, libc::MADV_FREE)?;
        for expected in &mut self.expected[first..first + pages] {
            if let Expected::Version(version) = *expected {
                *expected = Expected::VersionOrZero(version);
            }
        }
        Ok(())
    }

    fn advise(&self, first: usize, pages: usize, advice: i32) -> io::Result<()> {
        assert!(first % CHUNK_PAGES + pages <= CHUNK_PAGES, "a run lies in one chunk");
        let start = self.memory.word(first, 0).as_ptr().cast();
        // SAFETY: the run lies inside one chunk of this span, and `&mut self` of the callers says
        // that nobody else counts on its content.
        done(unsafe { libc::madvise(start, pages * PAGE_BYTES, advice) })
    }

    /// Moves a chunk to another address with all that it holds.
    pub(crate) fn move_chunk(&mut self, chunk: usize) -> io::Result<()> {
        let place = reserve()?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let chunk = self.chunk_mut(chunk);
        // SAFETY: the old range is a chunk of ours, the new one was reserved for this just now, and
        // the exclusive borrow says that nobody looks at the chunk while it moves.
        let moved = unsafe { libc::mremap(*chunk, CHUNK_BYTES, CHUNK_BYTES, flags, place) };
        *chunk = mapped(moved)?;
        Ok(())
    }

    /// Unmaps a chunk and maps a fresh one, which is zero, also if it gets the same address.
    pub(crate) fn replace_chunk(&mut self, chunk: usize) -> io::Result<()> {
        let place = self.chunk_mut(chunk);
        // SAFETY: the chunk is ours, and the exclusive borrow says that nobody uses it.
        done(unsafe { libc::munmap(*place, CHUNK_BYTES) })?;
        *place = map_chunk()?;
        self.expected[chunk * CHUNK_PAGES..][..CHUNK_PAGES].fill(Expected::Zero);
        Ok(())
    }

    /// Takes away the right to write a chunk, or gives it back.
    pub(crate) fn allow_writing(&mut self, chunk: usize, allow: bool) -> io::Result<()> {
        let protection = libc::PROT_READ | if allow { libc::PROT_WRITE } else { 0 };
        let chunk = self.chunk_mut(chunk);
        // SAFETY: the chunk is ours, and reading stays allowed.
        done(unsafe { libc::mprotect(*chunk, CHUNK_BYTES, protection) })
    }

    /// Writes page `from` into a pipe and reads it from there into page `to`, so that the kernel
    /// touches both; checks what arrived, and stamps `to` anew.
    pub(crate) fn send_through(
        &mut self,
        pipe: &Pipe,
        from: usize,
        to: usize,
    ) -> anyhow::Result<()> {
        pipe.write_page(self.memory.word(from, 0).as_ptr())?;
        pipe.read_page(self.memory.word(to, 0).as_ptr())?;
        for word in STAMPED_WORDS {
            let sent = self.memory.word(from, word).load(Ordering::Acquire);
            let found = self.memory.word(to, word).load(Ordering::Acquire);
            let freed = matches!(self.expected[from], Expected::VersionOrZero(_));
            if found != sent && !(freed && (found == 0 || sent == 0)) {
                return Err(self.memory.wrong(to, word, sent, found).into());
            }
        }
        self.write(to);
        Ok(())
    }
}

/// A pipe that holds at least one page.
pub(crate) struct Pipe {
    ends: [i32; 2],
}

impl Pipe {
    pub(crate) fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: the array has room for the two descriptors.
        done(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
        Ok(Self { ends })
    }

    fn write_page(&self, page: *const u64) -> io::Result<()> {
        // SAFETY: the caller passes the start of a mapped page.
        whole_page(|| unsafe { libc::write(self.ends[1], page.cast(), PAGE_BYTES) })
    }

    fn read_page(&self, page: *mut u64) -> io::Result<()> {
        // SAFETY: the caller passes the start of a mapped page that nobody else uses.
        whole_page(|| unsafe { libc::read(self.ends[0], page.cast(), PAGE_BYTES) })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        for end in self.ends {
            // SAFETY: the descriptors are ours and closed once.
            unsafe { libc::close(end) };
        }
    }
}

/// One transfer of a whole page, begun again when a signal came first: a pipe moves a page at
/// once or not at all.
fn whole_page(transfer: impl Fn() -> isize) -> io::Result<()> {
    loop {
        match transfer() {
            moved if moved == PAGE_BYTES.cast_signed() => return Ok(()),
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            moved => return Err(io::Error::other(format!("the pipe moved {moved} bytes"))),
        }
    }
}

fn map_chunk() -> io::Result<*mut c_void> {
    map(libc::PROT_READ | libc::PROT_WRITE)
}

fn reserve() -> io::Result<*mut c_void> {
    map(libc::PROT_NONE)
}

fn map(protection: i32) -> io::Result<*mut c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at a place that the kernel chooses touches nothing that exists.
    mapped(unsafe { libc::mmap(ptr::null_mut(), CHUNK_BYTES, protection, flags, -1, 0) })
}

fn mapped(address: *mut c_void) -> io::Result<*mut c_void> {
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
}

fn done(returned: i32) -> io::Result<()> {
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
