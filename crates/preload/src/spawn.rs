//! Makes the watcher of this process.
//!
//! Two steps, so that the program never sees a child of its own: an *intermediate* process that
//! the program waits for, and the watcher, which the intermediate makes before it exits at once.
//! Orphaned, the watcher is handed to the next subreaper: the supervisor. Both are clones that
//! share only the memory, send no signal when they end and are no threads, so that `wait(-1)`,
//! SIGCHLD, /proc/self/task and the program's descriptors show nothing of them.

use core::arch::global_asm;

use crate::kernel::{self, CLONE_UNTRACED, CLONE_VFORK, CLONE_VM, Errno, PAGE_BYTES, ProcessId};
use crate::tell::{self, Failure};
use crate::watcher;

/// Memory is all that the processes share. A debugger of the program is not told of them: it would
/// take them for threads.
const SHARING: usize = CLONE_VM | CLONE_UNTRACED;

/// The intermediate makes two system calls.
const INTERMEDIATE_STACK_BYTES: usize = 4 * PAGE_BYTES;

/// The watcher's deepest frame, in the loading of the pager, holds a page and a few texts of up to a
/// page. Untouched pages cost nothing.
const WATCHER_STACK_BYTES: usize = 16 * PAGE_BYTES;

/// ```text
/// | guard | intermediate's stack | watcher's stack | Start |
/// ```
const MAPPING_BYTES: usize =
    PAGE_BYTES + INTERMEDIATE_STACK_BYTES + WATCHER_STACK_BYTES + PAGE_BYTES;

/// Why a program has no watcher that would get one as its own child.
pub(crate) const ADOPTS_ORPHANS: &str =
    "it is the parent of orphans (PR_SET_CHILD_SUBREAPER, or the first process of its namespace)";

/// What the three processes tell each other, in the page behind the stacks.
#[derive(Debug)]
pub(crate) struct Start {
    /// The process to watch.
    pub(crate) program: ProcessId,
    /// Set by the intermediate: as long as it is the watcher's parent, the supervisor is not.
    pub(crate) intermediate: ProcessId,
    /// The memory that the stacks and this are in.
    pub(crate) mapping: (usize, usize),
    /// Set by the intermediate if there is no watcher.
    refused: Option<Errno>,
}

/// Makes a watcher for the calling process, or tells the supervisor why there is none.
pub(crate) fn watch_this_process() {
    let program = kernel::getpid();
    if kernel::adopts_orphans(program) {
        // The watcher would become its child: waiting for all children it would wait for ever.
        tell::unpaged_as(program, format_args!("{ADOPTS_ORPHANS}"));
        return;
    }
    // No handler of the program may run in a process of ours, nor while a half-made one exists.
    let signals = kernel::block_signals();
    let made = make_watcher(program);
    kernel::restore_signals(signals);
    if let Err(failure) = made {
        tell::unpaged(program, failure);
    }
}

fn make_watcher(program: ProcessId) -> Result<(), Failure> {
    let start = map_start(program).map_err(Failure::at("map a stack for the watcher"))?;
    let mapping = start.addr() & !(PAGE_BYTES - 1);
    let stack_top = start.cast::<u8>().wrapping_sub(start.addr() - mapping + WATCHER_STACK_BYTES);
    // SAFETY: the stack is fresh; the intermediate only makes system calls. `start` is used by
    // this process again only when the intermediate is gone, and by the watcher only to read.
    let outcome = unsafe {
        match kernel::clone_onto(SHARING | CLONE_VFORK, stack_top, intermediate, start) {
            Ok(child) => {
                kernel::wait_for_clone(child);
                (*start).refused.map_or(Ok(()), Err)
            }
            Err(errno) => Err(errno),
        }
    };
    outcome.map_err(|errno| {
        let (begin, end) = (mapping + PAGE_BYTES - MAPPING_BYTES, mapping + PAGE_BYTES);
        // SAFETY: mapped above, and no process of ours came into being that could use it.
        unsafe { kernel::munmap(begin, end - begin) };
        Failure { step: "start the watcher process", errno }
    })
}

/// Maps the two stacks and the page with `Start`, below them a guard page.
fn map_start(program: ProcessId) -> Result<*mut Start, Errno> {
    let flags = kernel::MAP_PRIVATE | kernel::MAP_ANONYMOUS | kernel::MAP_NORESERVE;
    let writable = kernel::PROT_READ | kernel::PROT_WRITE;
    // SAFETY: a new mapping where the kernel likes, its upper part made writable.
    let begin = unsafe {
        let begin = kernel::mmap(0, MAPPING_BYTES, kernel::PROT_NONE, flags, -1, 0)?;
        kernel::mprotect(begin + PAGE_BYTES, MAPPING_BYTES - PAGE_BYTES, writable)?;
        begin
    };
    let end = begin + MAPPING_BYTES;
    kernel::keep_private(begin, MAPPING_BYTES)?;
    let start = core::ptr::with_exposed_provenance_mut::<Start>(end - PAGE_BYTES);
    let content = Start { program, intermediate: 0, mapping: (begin, end), refused: None };
    // SAFETY: the page is mapped, writable, aligned and larger than a `Start`.
    unsafe { start.write(content) };
    Ok(start)
}

extern "C" fn intermediate(start: *mut Start) -> ! {
    // SAFETY: the program waits for this process, so nobody else uses `start`; the watcher's stack
    // ends where `start` begins. The watcher reads what was written before it was made.
    unsafe {
        (*start).intermediate = kernel::getpid();
        let made = kernel::clone_onto(SHARING, start.cast(), watcher::main, start);
        (*start).refused = made.err();
    }
    kernel::exit(0)
}

/// Has the C library call us in every child that `fork` makes: a child's memory is a copy, which
/// needs a watcher of its own. Its copy lacks the parent's watcher's stack (MADV_DONTFORK).
pub(crate) fn watch_forked_children() {
    // SAFETY: the word is written by the dynamic linker before any constructor runs.
    let register = unsafe { REGISTER_ATFORK };
    if let Some(register) = register {
        // SAFETY: the address is that of glibc's function, whose type this is. A library that is
        // never unloaded may go without a handle. Without memory for it children go unwatched.
        let _ = unsafe { register(None, None, Some(in_forked_child), core::ptr::null()) };
    }
}

extern "C" fn in_forked_child() {
    watch_this_process();
}

type Handler = Option<extern "C" fn()>;

unsafe extern "C" {
    /// glibc's `__register_atfork`, or null under a C library that has none.
    #[link_name = "farmem_register_atfork"]
    static REGISTER_ATFORK: Option<
        unsafe extern "C" fn(
            prepare: Handler,
            parent: Handler,
            child: Handler,
            library: *const u8,
        ) -> i32,
    >;
}

// Stable Rust has no weak imports. A weak one keeps this library loadable under every C library.
global_asm!(
    ".weak __register_atfork",
    ".pushsection .data.rel.ro.farmem_register_atfork, \"aw\", @progbits",
    ".balign 8",
    ".globl farmem_register_atfork",
    ".hidden farmem_register_atfork",
    "farmem_register_atfork: .quad __register_atfork",
    ".popsection",
);
