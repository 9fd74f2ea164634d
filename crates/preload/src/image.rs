//! Loads `farmem-pagerd`, a static position-independent executable, beside the program and jumps
//! into it as the kernel would after exec, but that the memory stays shared.
//!
//! One reservation holds all of it; nothing of it reaches forked children or core dumps:
//!
//! ```text
//! | guard | segments of the image | guard | stack | guard |
//! ```
//!
//! The pager finds on its stack what a new program finds: arguments (see [`Kept`]), an empty
//! environment, and an auxiliary vector that describes its own image and this machine.

use core::arch::asm;
use core::convert::Infallible;
use core::fmt::Write;

use crate::kernel::{self, Descriptor, Errno, PAGE_BYTES, ProcessId};
use crate::settings::settings;
use crate::tell::Failure;
use crate::text::Text;

/// What the pager needs to know, and gets as arguments in this order behind its name, the socket and
/// the limit: its fields, and then every range of memory that is not the program's (this library,
/// these stacks, the image).
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) program: ProcessId,
    pub(crate) program_descriptor: Descriptor,
    /// The sizes of this memory.
    pub(crate) statm: Descriptor,
    pub(crate) supervisor_descriptor: Descriptor,
    /// The mapping that the watcher's own stack is in.
    pub(crate) stacks: (usize, usize),
}

/// The pager's first thread runs on it. Untouched pages cost nothing.
const STACK_BYTES: usize = 1 << 20;

/// The linker makes ten; an image with more is not ours.
const SEGMENTS_MAX: usize = 16;

/// The pager's are under 8 MiB in all; beyond this the file is not ours.
const IMAGE_BYTES_MAX: usize = 256 << 20;

const EXEC_FORMAT: Errno = Errno(8);
const NO_MEMORY: Errno = Errno(12);

/// Turns this process into the pager. Returns only if it cannot.
pub(crate) fn become_pager(kept: &Kept) -> Result<Infallible, Failure> {
    let file = kernel::open(settings().pager.as_c_str()).map_err(Failure::at("open the pager"))?;
    kernel::raise_limits();
    let loaded = Header::read(file).and_then(|header| Image::load(file, header));
    // SAFETY: opened above; the mappings stay without it.
    unsafe { kernel::close(file) };
    let image = loaded?;
    let stack_pointer = image.prepare_stack(kept).inspect_err(|_| image.unload())?;
    kernel::reset_signals();
    kernel::set_name(c"farmem-pagerd");
    // SAFETY: the stack holds what the entry wants; this process's own frames are not needed again.
    unsafe { enter(image.address(image.header.entry), stack_pointer) }
}

/// Jumps to `entry` with the stack as the kernel leaves it after exec.
///
/// # Safety
/// `entry` is the start of a program, `stack_pointer` points at its argument count.
unsafe fn enter(entry: usize, stack_pointer: usize) -> ! {
    // SAFETY: rdx = 0 says that no dynamic linker wants to be called at exit; nothing returns.
    unsafe {
        asm!(
            "mov rsp, {stack_pointer}",
            "xor ebp, ebp",
            "xor edx, edx",
            "jmp {entry}",
            stack_pointer = in(reg) stack_pointer,
            entry = in(reg) entry,
            options(noreturn),
        )
    }
}

/// A PT_LOAD of the image.
#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    protection: usize,
    file_offset: usize,
    /// Where it begins, counted from the image's base.
    address: usize,
    file_bytes: usize,
    memory_bytes: usize,
}

/// What the file's first page says.
#[derive(Debug)]
struct Header {
    entry: usize,
    table: usize,
    table_entries: usize,
    segments: [Segment; SEGMENTS_MAX],
    segment_count: usize,
    /// Bytes from the base to the end of the last segment, in whole pages.
    span: usize,
}

/// Little-endian fields of a structure in a file.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn number<const BYTES: usize>(&self, offset: usize) -> Option<usize> {
        let mut wide = [0; 8];
        wide[..BYTES].copy_from_slice(self.0.get(offset..offset + BYTES)?);
        usize::try_from(u64::from_le_bytes(wide)).ok()
    }
}

impl Header {
    fn read(file: Descriptor) -> Result<Self, Failure> {
        let mut page = [0; PAGE_BYTES];
        let read =
            kernel::pread(file, &mut page, 0).map_err(Failure::at("read the pager's header"))?;
        Self::parse(&page[..read]).ok_or(Failure {
            step: "load the pager, which is no static position-independent executable",
            errno: EXEC_FORMAT,
        })
    }

    fn parse(page: &[u8]) -> Option<Self> {
        const CLASS_64_LITTLE_ENDIAN: &[u8] = b"\x7fELF\x02\x01\x01";
        const DYNAMIC: usize = 3;
        const X86_64: usize = 62;
        const TABLE_ENTRY_BYTES: usize = 56;
        let fields = Fields(page);
        let ours = page.starts_with(CLASS_64_LITTLE_ENDIAN)
            && fields.number::<2>(16)? == DYNAMIC
            && fields.number::<2>(18)? == X86_64
            && fields.number::<2>(54)? == TABLE_ENTRY_BYTES;
        if !ours {
            return None;
        }
        let mut header = Self {
            entry: fields.number::<8>(24)?,
            table: fields.number::<8>(32)?,
            table_entries: fields.number::<2>(56)?,
            segments: [Segment::default(); SEGMENTS_MAX],
            segment_count: 0,
            span: 0,
        };
        for entry in 0..header.table_entries {
            let begin = header.table.checked_add(entry * TABLE_ENTRY_BYTES)?;
            let end = begin.checked_add(TABLE_ENTRY_BYTES)?;
            header.add(&Fields(page.get(begin..end)?))?;
        }
        header.starts_in_code().then_some(header)
    }

    /// Shared libraries look the same but for this.
    fn starts_in_code(&self) -> bool {
        self.segments[..self.segment_count].iter().any(|segment| {
            let offset = self.entry.wrapping_sub(segment.address);
            segment.protection & kernel::PROT_EXEC != 0 && offset < segment.file_bytes
        })
    }

    fn add(&mut self, entry: &Fields<'_>) -> Option<()> {
        const LOAD: usize = 1;
        const INTERPRETER: usize = 3;
        match entry.number::<4>(0)? {
            LOAD => {}
            INTERPRETER => return None,
            _ => return Some(()),
        }
        let segment = Segment {
            protection: protection(entry.number::<4>(4)?),
            file_offset: entry.number::<8>(8)?,
            address: entry.number::<8>(16)?,
            file_bytes: entry.number::<8>(32)?,
            memory_bytes: entry.number::<8>(40)?,
        };
        let end = segment.address.checked_add(segment.memory_bytes)?;
        let fits = segment.file_bytes <= segment.memory_bytes
            && end <= IMAGE_BYTES_MAX
            && segment.address >= self.span // in order, in pages of their own
            && segment.file_offset % PAGE_BYTES == segment.address % PAGE_BYTES
            && entry.number::<8>(48)? <= PAGE_BYTES;
        if !fits {
            return None;
        }
        *self.segments.get_mut(self.segment_count)? = segment;
        self.segment_count += 1;
        self.span = end.next_multiple_of(PAGE_BYTES);
        Some(())
    }
}

fn protection(flags: usize) -> usize {
    let when = |flag, protection| {
        if flags & flag != 0 { protection } else { kernel::PROT_NONE }
    };
    when(4, kernel::PROT_READ) | when(2, kernel::PROT_WRITE) | when(1, kernel::PROT_EXEC)
}

/// The image in memory, with its stack.
#[derive(Debug)]
struct Image {
    header: Header,
    /// Where the reservation begins: the guard below the image.
    begin: usize,
    bytes: usize,
}

impl Image {
    fn load(file: Descriptor, header: Header) -> Result<Self, Failure> {
        let bytes = header.span + STACK_BYTES + 3 * PAGE_BYTES;
        let flags = kernel::MAP_PRIVATE | kernel::MAP_ANONYMOUS | kernel::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes.
        let begin = unsafe { kernel::mmap(0, bytes, kernel::PROT_NONE, flags, -1, 0) }
            .map_err(Failure::at("reserve memory for the pager"))?;
        let image = Self { header, begin, bytes };
        let mapped = image
            .map_segments(file)
            .and_then(|()| image.map_stack())
            .and_then(|()| kernel::keep_private(begin, bytes));
        mapped.map_err(Failure::at("map the pager's image")).inspect_err(|_| image.unload())?;
        Ok(image)
    }

    fn unload(&self) {
        // SAFETY: the reservation is this image's own, and nothing runs in it yet.
        unsafe { kernel::munmap(self.begin, self.bytes) };
    }

    /// The address of what lies at `offset` of the image.
    fn address(&self, offset: usize) -> usize {
        self.begin + PAGE_BYTES + offset
    }

    fn stack_end(&self) -> usize {
        self.begin + self.bytes - PAGE_BYTES
    }

    fn map_segments(&self, file: Descriptor) -> Result<(), Errno> {
        let segments = &self.header.segments[..self.header.segment_count];
        segments.iter().try_for_each(|segment| self.map_segment(segment, file))
    }

    /// The file's part, then zeros to the end: those in the file's last page are written, the
    /// pages behind it are new.
    fn map_segment(&self, segment: &Segment, file: Descriptor) -> Result<(), Errno> {
        let begin = self.address(segment.address);
        let first_page = begin & !(PAGE_BYTES - 1);
        let file_end = begin + segment.file_bytes;
        let end = (begin + segment.memory_bytes).next_multiple_of(PAGE_BYTES);
        let mut zeros = first_page;
        if segment.file_bytes > 0 {
            let flags = kernel::MAP_PRIVATE | kernel::MAP_FIXED;
            let offset = segment.file_offset - (begin - first_page);
            let bytes = file_end - first_page;
            zeros = file_end.next_multiple_of(PAGE_BYTES);
            // SAFETY: `parse` holds every segment inside the reservation, apart from the others.
            unsafe { kernel::mmap(first_page, bytes, segment.protection, flags, file, offset)? };
            if segment.protection & kernel::PROT_WRITE != 0 {
                let tail = core::ptr::with_exposed_provenance_mut::<u8>(file_end);
                // SAFETY: from the end of the file's part to the end of its page, writable.
                unsafe { tail.write_bytes(0, zeros - file_end) };
            }
        }
        if end > zeros {
            let flags = kernel::MAP_PRIVATE | kernel::MAP_FIXED | kernel::MAP_ANONYMOUS;
            // SAFETY: as above.
            unsafe { kernel::mmap(zeros, end - zeros, segment.protection, flags, -1, 0)? };
        }
        Ok(())
    }

    fn map_stack(&self) -> Result<(), Errno> {
        let writable = kernel::PROT_READ | kernel::PROT_WRITE;
        // SAFETY: the range is inside the reservation, above the second guard.
        unsafe { kernel::mprotect(self.stack_end() - STACK_BYTES, STACK_BYTES, writable) }
    }

    /// Writes arguments and auxiliary vector; the result is the stack pointer to start with.
    fn prepare_stack(&self, kept: &Kept) -> Result<usize, Failure> {
        let mut random = [0; 16];
        kernel::fill_random(&mut random).map_err(Failure::at("get random bytes"))?;
        let mut stack = Stack::ending_at(self.stack_end());
        let random = stack.push(&random);
        let mut words = Words::new();
        self.push_arguments(kept, &mut stack, &mut words)
            .ok_or(Failure { step: "write the pager's arguments", errno: NO_MEMORY })?;
        words.push(0); // The environment is empty.
        self.push_auxiliary(random, &mut words);
        Ok(stack.finish(words.as_slice()))
    }

    fn push_arguments(&self, kept: &Kept, stack: &mut Stack, words: &mut Words) -> Option<()> {
        let numbers = [
            i64::try_from(settings().limit_bytes).ok()?,
            i64::from(kept.program),
            i64::from(kept.program_descriptor),
            i64::from(kept.statm),
            i64::from(kept.supervisor_descriptor),
        ];
        let ranges = [library(), kept.stacks, (self.begin, self.begin + self.bytes)];
        words.push(2 + numbers.len() + ranges.len());
        words.push(stack.push(b"farmem-pagerd\0"));
        words.push(stack.push(settings().socket.as_c_str().to_bytes_with_nul()));
        for number in numbers {
            words.push(stack.push_text(format_args!("{number}"))?);
        }
        for (begin, end) in ranges {
            words.push(stack.push_text(format_args!("{begin:x}-{end:x}"))?);
        }
        words.push(0);
        Some(())
    }

    /// The program's auxiliary vector tells what the machine is like; what describes the image is
    /// replaced.
    fn push_auxiliary(&self, random: usize, words: &mut Words) {
        const END: usize = 0;
        const TABLE: usize = 3;
        const TABLE_ENTRIES: usize = 5;
        const INTERPRETER: usize = 7;
        const ENTRY: usize = 9;
        const PLATFORM: usize = 15;
        const SECURE: usize = 23;
        const BASE_PLATFORM: usize = 24;
        const RANDOM: usize = 25;
        const FILE_NAME: usize = 31;
        for &(kind, value) in settings().auxiliary() {
            let value = match kind {
                TABLE => self.address(self.header.table),
                TABLE_ENTRIES => self.header.table_entries,
                INTERPRETER | SECURE => 0,
                ENTRY => self.address(self.header.entry),
                RANDOM => random,
                // These point into the program's memory.
                PLATFORM | BASE_PLATFORM | FILE_NAME => continue,
                _ => value,
            };
            words.push(kind);
            words.push(value);
        }
        words.push(END);
        words.push(0);
    }
}

/// The memory that this library is loaded in.
fn library() -> (usize, usize) {
    unsafe extern "C" {
        #[link_name = "__ehdr_start"]
        static BEGIN: u8;
        #[link_name = "_end"]
        static END: u8;
    }
    ((&raw const BEGIN).addr(), (&raw const END).addr().next_multiple_of(PAGE_BYTES))
}

/// Words of the initial stack: under 20 arguments, the auxiliary vector, their ends.
const WORDS_MAX: usize = 128;

struct Words {
    words: [usize; WORDS_MAX],
    length: usize,
}

impl Words {
    fn new() -> Self {
        Self { words: [0; WORDS_MAX], length: 0 }
    }

    /// There is room: `settings` bounds the vector, this file the arguments.
    fn push(&mut self, word: usize) {
        self.words[self.length] = word;
        self.length += 1;
    }

    fn as_slice(&self) -> &[usize] {
        &self.words[..self.length]
    }
}

/// The pager's stack, filled from its end. A few kilobytes of its megabyte are used here.
struct Stack {
    top: usize,
}

impl Stack {
    fn ending_at(end: usize) -> Self {
        Self { top: end }
    }

    fn push(&mut self, bytes: &[u8]) -> usize {
        self.top -= bytes.len();
        let place = core::ptr::with_exposed_provenance_mut::<u8>(self.top);
        // SAFETY: inside the fresh, writable stack, which nobody uses yet.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.top
    }

    fn push_text(&mut self, text: core::fmt::Arguments<'_>) -> Option<usize> {
        let mut formatted = Text::<64>::new();
        formatted.write_fmt(text).ok()?;
        Some(self.push(formatted.as_c_str().to_bytes_with_nul()))
    }

    /// Puts the words where the stack pointer will be: a multiple of 16.
    fn finish(mut self, words: &[usize]) -> usize {
        self.top = (self.top - size_of_val(words)) & !15;
        let place = core::ptr::with_exposed_provenance_mut::<usize>(self.top);
        // SAFETY: inside the fresh, writable stack, and aligned.
        unsafe { place.copy_from_nonoverlapping(words.as_ptr(), words.len()) };
        self.top
    }
}
