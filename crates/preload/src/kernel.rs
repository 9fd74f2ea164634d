//! The system calls that this crate makes, straight to the kernel, and the numbers they need.
//! Nothing here touches `errno` or the thread pointer.

use core::arch::asm;
use core::ffi::CStr;

/// An error number of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

pub(crate) const EINTR: Errno = Errno(4);

pub(crate) const PAGE_BYTES: usize = 4096;

pub(crate) const PROT_NONE: usize = 0;
pub(crate) const PROT_READ: usize = 1;
pub(crate) const PROT_WRITE: usize = 2;
pub(crate) const PROT_EXEC: usize = 4;
pub(crate) const MAP_PRIVATE: usize = 0x02;
pub(crate) const MAP_FIXED: usize = 0x10;
pub(crate) const MAP_ANONYMOUS: usize = 0x20;
pub(crate) const MAP_NORESERVE: usize = 0x4000;
pub(crate) const MADV_DONTFORK: usize = 10;
pub(crate) const MADV_DONTDUMP: usize = 16;
pub(crate) const CLONE_VM: usize = 0x100;
pub(crate) const CLONE_VFORK: usize = 0x4000;
pub(crate) const CLONE_UNTRACED: usize = 0x80_0000;
pub(crate) const SIGKILL: usize = 9;
pub(crate) const SIGPIPE: usize = 13;
pub(crate) const SIGNAL_MAX: usize = 64;
pub(crate) const POLLIN: i16 = 1;

const SYS_WRITE: usize = 1;
const SYS_CLOSE: usize = 3;
const SYS_MMAP: usize = 9;
const SYS_MPROTECT: usize = 10;
const SYS_MUNMAP: usize = 11;
const SYS_RT_SIGACTION: usize = 13;
const SYS_RT_SIGPROCMASK: usize = 14;
const SYS_PREAD64: usize = 17;
const SYS_MADVISE: usize = 28;
const SYS_GETPID: usize = 39;
const SYS_SOCKET: usize = 41;
const SYS_CONNECT: usize = 42;
const SYS_SENDTO: usize = 44;
const SYS_CLONE: usize = 56;
const SYS_WAIT4: usize = 61;
const SYS_CHDIR: usize = 80;
const SYS_SETPGID: usize = 109;
const SYS_GETPPID: usize = 110;
const SYS_SCHED_SETSCHEDULER: usize = 144;
const SYS_PRCTL: usize = 157;
const SYS_EXIT_GROUP: usize = 231;
const SYS_OPENAT: usize = 257;
const SYS_PPOLL: usize = 271;
const SYS_SIGNALFD4: usize = 289;
const SYS_PRLIMIT64: usize = 302;
const SYS_KCMP: usize = 312;
const SYS_SCHED_SETATTR: usize = 314;
const SYS_SCHED_GETATTR: usize = 315;
const SYS_GETRANDOM: usize = 318;
const SYS_PIDFD_SEND_SIGNAL: usize = 424;
const SYS_PIDFD_OPEN: usize = 434;
const SYS_CLOSE_RANGE: usize = 436;

/// A process id, a descriptor: plain numbers of the kernel, `i32` as it has them.
pub(crate) type ProcessId = i32;
pub(crate) type Descriptor = i32;

/// # Safety
/// The arguments must be what the numbered call takes, and every pointer among them valid for it.
#[inline]
unsafe fn call(number: usize, arguments: [usize; 6]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the kernel keeps all registers but rax, rcx and r11; memory is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number.cast_signed() => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            in("r8") arguments[4],
            in("r9") arguments[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-4095..0).contains(&result) {
        return Err(Errno(-result as i32));
    }
    Ok(result.cast_unsigned())
}

/// Makes a process that shares this one's memory, has the calling thread's signal mask, and runs
/// `entry(argument)` on its own stack.
///
/// # Safety
/// `stack_top` ends writable memory that nobody else uses while the process lives; `entry` keeps
/// to the rules of this crate; `flags` hold CLONE_VM and no flag that takes a further pointer.
pub(crate) unsafe fn clone_onto<T>(
    flags: usize,
    stack_top: *mut u8,
    entry: extern "C" fn(*mut T) -> !,
    argument: *mut T,
) -> Result<ProcessId, Errno> {
    let result: isize;
    // SAFETY: in the new process (rax = 0) execution goes on with the stack given and never comes
    // back to this frame; in the caller the call behaves as any other.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") SYS_CLONE.cast_signed() => result,
            in("rdi") flags,
            in("rsi") stack_top.addr() & !15,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") entry,
            in("r13") argument,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 { Err(Errno(-result as i32)) } else { Ok(result as ProcessId) }
}

/// # Safety
/// With MAP_FIXED the range must be the caller's to replace.
pub(crate) unsafe fn mmap(
    address: usize,
    bytes: usize,
    protection: usize,
    flags: usize,
    file: Descriptor,
    offset: usize,
) -> Result<usize, Errno> {
    // SAFETY: no pointer is read; what is replaced is the caller's promise.
    unsafe { call(SYS_MMAP, [address, bytes, protection, flags, file as usize, offset]) }
}

/// # Safety
/// The range must be the caller's own.
pub(crate) unsafe fn mprotect(start: usize, bytes: usize, protection: usize) -> Result<(), Errno> {
    // SAFETY: the caller owns the range.
    unsafe { call(SYS_MPROTECT, [start, bytes, protection, 0, 0, 0]) }.map(drop)
}

/// # Safety
/// The range must be the caller's own, and unused from now on.
pub(crate) unsafe fn munmap(start: usize, bytes: usize) {
    // SAFETY: the caller owns the range; an own, mapped range cannot be refused.
    let _ = unsafe { call(SYS_MUNMAP, [start, bytes, 0, 0, 0, 0]) };
}

/// Keeps a range of ours out of forked children and core dumps.
pub(crate) fn keep_private(start: usize, bytes: usize) -> Result<(), Errno> {
    for advice in [MADV_DONTFORK, MADV_DONTDUMP] {
        // SAFETY: neither advice changes what this process sees in the range.
        unsafe { call(SYS_MADVISE, [start, bytes, advice, 0, 0, 0])? };
    }
    Ok(())
}

/// madvise(2) for the program itself.
pub(crate) fn madvise(start: usize, bytes: usize, advice: i32) -> Result<(), Errno> {
    let advice = advice.cast_unsigned() as usize;
    // SAFETY: the program calls this, and what it asks for is its own affair.
    unsafe { call(SYS_MADVISE, [start, bytes, advice, 0, 0, 0]) }.map(|_| ())
}

/// Blocks every signal in the calling thread; the result is for `restore_signals`.
pub(crate) fn block_signals() -> u64 {
    let all = u64::MAX;
    let mut before = 0u64;
    let pointers = [2, (&raw const all).addr(), (&raw mut before).expose_provenance(), 8, 0, 0];
    // SAFETY: both pointers are to live u64, the size of the kernel's set. It cannot fail.
    let _ = unsafe { call(SYS_RT_SIGPROCMASK, pointers) };
    before
}

pub(crate) fn restore_signals(before: u64) {
    let before = (&raw const before).expose_provenance();
    // SAFETY: the pointer is to a live u64; the old set is not asked for. It cannot fail.
    let _ = unsafe { call(SYS_RT_SIGPROCMASK, [2, before, 0, 8, 0, 0]) };
}

/// Puts every signal of this process to its default action, and ignores SIGPIPE.
pub(crate) fn reset_signals() {
    for signal in 1..=SIGNAL_MAX {
        // The kernel's sigaction: handler, flags, restorer, mask. 0 is the default, 1 to ignore.
        let action = [usize::from(signal == SIGPIPE), 0, 0, 0];
        let action = (&raw const action).expose_provenance();
        // SAFETY: the pointer is to four live words. SIGKILL and SIGSTOP are refused, rightly.
        let _ = unsafe { call(SYS_RT_SIGACTION, [signal, action, 0, 8, 0, 0]) };
    }
}

pub(crate) fn getpid() -> ProcessId {
    // SAFETY: takes nothing.
    unsafe { call(SYS_GETPID, [0; 6]) }.map_or(0, |id| id as ProcessId)
}

pub(crate) fn getppid() -> ProcessId {
    // SAFETY: takes nothing.
    unsafe { call(SYS_GETPPID, [0; 6]) }.map_or(0, |id| id as ProcessId)
}

/// Whether orphans among the descendants of the calling process `itself` become its children.
pub(crate) fn adopts_orphans(itself: ProcessId) -> bool {
    const PR_GET_CHILD_SUBREAPER: usize = 37;
    const INIT: ProcessId = 1;
    let mut is_subreaper = 0_i32;
    let pointer = (&raw mut is_subreaper).expose_provenance();
    // SAFETY: the pointer is to a live i32, to be written.
    let _ = unsafe { call(SYS_PRCTL, [PR_GET_CHILD_SUBREAPER, pointer, 0, 0, 0, 0]) };
    itself == INIT || is_subreaper != 0
}

/// Waits for a child that sends no signal at its end.
pub(crate) fn wait_for_clone(child: ProcessId) {
    const WCLONE: usize = 0x8000_0000;
    // SAFETY: no status and no usage are asked for.
    while unsafe { call(SYS_WAIT4, [child as usize, 0, WCLONE, 0, 0, 0]) } == Err(EINTR) {}
}

pub(crate) fn exit(status: usize) -> ! {
    loop {
        // SAFETY: ends the process.
        let _ = unsafe { call(SYS_EXIT_GROUP, [status, 0, 0, 0, 0, 0]) };
    }
}

/// Leaves the process group of the program: signals of its terminal are not for us.
pub(crate) fn leave_process_group() {
    // SAFETY: takes no pointers. Refused only to a session leader, which a fresh process is not.
    let _ = unsafe { call(SYS_SETPGID, [0; 6]) };
}

/// Leaves the working directory of the program, so that its file system can be unmounted.
pub(crate) fn leave_directory() {
    // SAFETY: the path ends with a zero byte. If it is refused, nothing is lost but that.
    let _ = unsafe { call(SYS_CHDIR, [c"/".as_ptr().expose_provenance(), 0, 0, 0, 0, 0]) };
}

pub(crate) fn set_name(name: &CStr) {
    const PR_SET_NAME: usize = 15;
    // SAFETY: the name ends with a zero byte.
    let _ = unsafe { call(SYS_PRCTL, [PR_SET_NAME, name.as_ptr().addr(), 0, 0, 0, 0]) };
}

/// Runs before whatever else wants the processor, if the system lets it: a program can fill
/// gigabytes while a watcher waits for its turn. Nothing that this process starts inherits it.
pub(crate) fn be_on_time() {
    const SCHED_FIFO: usize = 1;
    const SCHED_RESET_ON_FORK: usize = 0x4000_0000;
    let priority = 1i32;
    let pointer = (&raw const priority).expose_provenance();
    // SAFETY: the pointer is to a live i32, the kernel's sched_param, to be read.
    let granted = unsafe {
        call(SYS_SCHED_SETSCHEDULER, [0, SCHED_FIFO | SCHED_RESET_ON_FORK, pointer, 0, 0, 0])
    };
    if granted.is_err() {
        ask_for_short_slices();
    }
}

/// How to be scheduled: the kernel's sched_attr in its first form.
#[repr(C)]
#[derive(Default)]
struct Scheduling {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// What anybody may ask for (Linux 6.12): short turns, which come soon. Who asks for the shortest is the
/// first of all of its priority to run when it wakes up.
fn ask_for_short_slices() {
    const SCHED_FLAG_RESET_ON_FORK: u64 = 1;
    const SHORTEST_NANOSECONDS: u64 = 100_000;
    const BYTES: usize = size_of::<Scheduling>();
    let mut own = Scheduling::default();
    let pointer = (&raw mut own).expose_provenance();
    // SAFETY: the pointer is to a live structure of the size that is given, to be written.
    let known = unsafe { call(SYS_SCHED_GETATTR, [0, pointer, BYTES, 0, 0, 0]) };
    if known.is_err() {
        return;
    }
    own.flags |= SCHED_FLAG_RESET_ON_FORK;
    own.runtime = SHORTEST_NANOSECONDS;
    let pointer = (&raw const own).expose_provenance();
    // SAFETY: as above, to be read. An older kernel takes no notice of it.
    let _ = unsafe { call(SYS_SCHED_SETATTR, [0, pointer, 0, 0, 0, 0]) };
}

/// A core of this process would be one of the program's memory.
pub(crate) fn forbid_core_dumps() {
    const RLIMIT_CORE: usize = 4;
    // Not 0: the kernel pipes cores to a handler all the same, but for this value.
    let limit = [1u64; 2];
    let pointer = (&raw const limit).expose_provenance();
    // SAFETY: the pointer is to a live pair of u64, the kernel's rlimit64, to be read. If the hard
    // limit is 0 already, raising it may be refused, and cores are off.
    let _ = unsafe { call(SYS_PRLIMIT64, [0, RLIMIT_CORE, pointer, 0, 0, 0]) };
}

/// Raises this process's own limits to what it may have; those of the program are other ones.
pub(crate) fn raise_limits() {
    const RLIMIT_CPU: usize = 0;
    const RLIMIT_FSIZE: usize = 1;
    const RLIMIT_DATA: usize = 2;
    const RLIMIT_NPROC: usize = 6;
    const RLIMIT_NOFILE: usize = 7;
    const RLIMIT_MEMLOCK: usize = 8;
    const RLIMIT_AS: usize = 9;
    let resources = [
        RLIMIT_CPU,
        RLIMIT_FSIZE,
        RLIMIT_DATA,
        RLIMIT_NPROC,
        RLIMIT_NOFILE,
        RLIMIT_MEMLOCK,
        RLIMIT_AS,
    ];
    for resource in resources {
        let none = [u64::MAX; 2];
        let pointer = (&raw const none).expose_provenance();
        // SAFETY: the pointer is to a live pair of u64, the kernel's rlimit64, to be read. Only who has the
        // right may raise a hard limit, and not all of them without end.
        if unsafe { call(SYS_PRLIMIT64, [0, resource, pointer, 0, 0, 0]) }.is_ok() {
            continue;
        }
        let mut limit = [0u64; 2];
        let pointer = (&raw mut limit).expose_provenance();
        // SAFETY: the pointer is to a live pair of u64, the kernel's rlimit64, to be written.
        if unsafe { call(SYS_PRLIMIT64, [0, resource, 0, pointer, 0, 0]) }.is_ok() {
            limit[0] = limit[1];
            let pointer = (&raw const limit).expose_provenance();
            // SAFETY: as above, to be read. Up to the hard limit it is never refused.
            let _ = unsafe { call(SYS_PRLIMIT64, [0, resource, pointer, 0, 0, 0]) };
        }
    }
}

pub(crate) fn open(path: &CStr) -> Result<Descriptor, Errno> {
    const AT_FDCWD: usize = -100isize as usize;
    const O_CLOEXEC: usize = 0o2_000_000;
    // SAFETY: the path ends with a zero byte; read-only.
    unsafe { call(SYS_OPENAT, [AT_FDCWD, path.as_ptr().expose_provenance(), O_CLOEXEC, 0, 0, 0]) }
        .map(|file| file as Descriptor)
}

/// # Safety
/// Nobody uses the descriptor any more.
pub(crate) unsafe fn close(file: Descriptor) {
    // SAFETY: the caller owns the descriptor.
    let _ = unsafe { call(SYS_CLOSE, [file as usize, 0, 0, 0, 0, 0]) };
}

/// # Safety
/// Nothing of this process uses any descriptor.
pub(crate) unsafe fn close_all() {
    // SAFETY: the caller needs none of them.
    let _ = unsafe { call(SYS_CLOSE_RANGE, [0, u32::MAX as usize, 0, 0, 0, 0]) };
}

pub(crate) fn pread(file: Descriptor, buffer: &mut [u8], offset: usize) -> Result<usize, Errno> {
    let start = buffer.as_mut_ptr().expose_provenance();
    // SAFETY: the buffer is ours to write for its whole length.
    unsafe { call(SYS_PREAD64, [file as usize, start, buffer.len(), offset, 0, 0]) }
}

pub(crate) fn write(file: Descriptor, bytes: &[u8]) {
    // SAFETY: the bytes are live. Who cannot be told is not told.
    let _ = unsafe {
        call(SYS_WRITE, [file as usize, bytes.as_ptr().expose_provenance(), bytes.len(), 0, 0, 0])
    };
}

pub(crate) fn fill_random(buffer: &mut [u8; 16]) -> Result<(), Errno> {
    let start = buffer.as_mut_ptr().expose_provenance();
    // SAFETY: the buffer is ours to write for its whole length.
    unsafe { call(SYS_GETRANDOM, [start, buffer.len(), 0, 0, 0, 0]) }.map(drop)
}

/// One descriptor that `wait_readable` waits for, as the kernel has it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Poll {
    pub(crate) file: Descriptor,
    pub(crate) events: i16,
    pub(crate) found: i16,
}

/// Waits until one of `polls` has an event, or the time is over.
pub(crate) fn wait_readable(polls: &mut [Poll], nanoseconds: u64) {
    let time = [nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000];
    let start = polls.as_mut_ptr().expose_provenance();
    let time = (&raw const time).expose_provenance();
    // SAFETY: `polls` and the timespec are live; no signal mask is given. A failure is a short
    // wait, and every caller waits in a loop.
    let _ = unsafe { call(SYS_PPOLL, [start, polls.len(), time, 0, 0, 0]) };
}

/// A descriptor that is readable while the signal, which is blocked, is pending.
pub(crate) fn signal_descriptor(signal: usize) -> Result<Descriptor, Errno> {
    const NEW: usize = -1isize as usize;
    const SFD_CLOEXEC: usize = 0o2_000_000;
    let set = 1u64 << (signal - 1);
    let pointer = (&raw const set).expose_provenance();
    // SAFETY: the pointer is to a live u64, the size of the kernel's set, to be read.
    unsafe { call(SYS_SIGNALFD4, [NEW, pointer, 8, SFD_CLOEXEC, 0, 0]) }.map(|fd| fd as Descriptor)
}

pub(crate) fn pidfd_open(process: ProcessId) -> Result<Descriptor, Errno> {
    // SAFETY: takes no pointers.
    unsafe { call(SYS_PIDFD_OPEN, [process as usize, 0, 0, 0, 0, 0]) }.map(|fd| fd as Descriptor)
}

pub(crate) fn kill(process: Descriptor) {
    // SAFETY: no signal information is given. A process that is gone needs no signal.
    let _ = unsafe { call(SYS_PIDFD_SEND_SIGNAL, [process as usize, SIGKILL, 0, 0, 0, 0]) };
}

/// Whether two processes have the same memory, if the kernel tells.
pub(crate) fn same_memory(one: ProcessId, other: ProcessId) -> Result<bool, Errno> {
    const KCMP_VM: usize = 1;
    // SAFETY: takes no pointers.
    unsafe { call(SYS_KCMP, [one as usize, other as usize, KCMP_VM, 0, 0, 0]) }
        .map(|order| order == 0)
}

/// A connection to the abstract Unix socket `name`, which keeps the borders of packets.
///
/// # Safety
/// The caller closes it.
pub(crate) unsafe fn connect(name: &[u8]) -> Result<Descriptor, Errno> {
    const AF_UNIX: u16 = 1;
    const SOCK_SEQPACKET_CLOEXEC: usize = 5 | 0o2_000_000;
    const NAME_TOO_LONG: Errno = Errno(36);
    #[repr(C)]
    struct Address {
        family: u16,
        path: [u8; 108],
    }
    let mut address = Address { family: AF_UNIX, path: [0; 108] };
    address.path.get_mut(1..=name.len()).ok_or(NAME_TOO_LONG)?.copy_from_slice(name);
    let pointer = (&raw const address).expose_provenance();
    let length = size_of::<u16>() + 1 + name.len();
    let domain = usize::from(AF_UNIX);
    // SAFETY: takes no pointers.
    let socket = unsafe { call(SYS_SOCKET, [domain, SOCK_SEQPACKET_CLOEXEC, 0, 0, 0, 0])? };
    // SAFETY: the address is live and as long as said: family, a zero byte, the name.
    match unsafe { call(SYS_CONNECT, [socket, pointer, length, 0, 0, 0]) } {
        Ok(_) => Ok(socket as Descriptor),
        Err(errno) => {
            // SAFETY: made above.
            unsafe { close(socket as Descriptor) };
            Err(errno)
        }
    }
}

/// Sends one packet. Who does not listen is not told.
pub(crate) fn send(socket: Descriptor, packet: &[u8]) {
    const MSG_NOSIGNAL: usize = 0x4000;
    let start = packet.as_ptr().expose_provenance();
    // SAFETY: the packet is live; no address is given.
    let _ = unsafe { call(SYS_SENDTO, [socket as usize, start, packet.len(), MSG_NOSIGNAL, 0, 0]) };
}
