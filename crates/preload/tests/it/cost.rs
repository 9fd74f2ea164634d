//! What the library costs a program that does nothing, in things that can be counted: what they take
//! depends on the machine and is measured by `cargo xtask bench make`.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::ptr;

use libc::{SIGTRAP, c_int, pid_t};

use crate::harness::{Run, reap_companions};

/// System calls that the library may add; 19 here: the dynamic linker finds and maps it, its constructor
/// looks at the limits of the process and makes a watcher.
const SYSTEM_CALLS_MAX: i64 = 30;
/// First touches of pages that it may add; 6 to 12 here, of its own data.
const FAULTS_MAX: i64 = 24;

#[test]
fn library_and_constructor_make_few_system_calls_and_faults() {
    let Some(run) = Run::new(64 << 10) else { return };
    let alone = Costs::of(&mut Command::new("/bin/true"));
    let watched = Costs::of(&mut run.command("/bin/true"));
    reap_companions();
    let (calls, faults) =
        (watched.system_calls - alone.system_calls, watched.faults - alone.faults);
    eprintln!("/bin/true: {alone:?}, watched {watched:?}");
    assert!(calls > 0, "the library is not there");
    assert!(calls <= SYSTEM_CALLS_MAX, "{calls} system calls more");
    assert!(faults <= FAULTS_MAX, "{faults} faults more");
}

/// What one process did, from its exec to its end.
#[derive(Debug)]
struct Costs {
    system_calls: i64,
    faults: i64,
}

impl Costs {
    fn of(command: &mut Command) -> Self {
        let traced = || {
            // SAFETY: asks for nothing but to be traced by the parent; both pointers are ignored.
            let result = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        // SAFETY: the closure makes one system call.
        let command =
            unsafe { command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).pre_exec(traced) };
        let process = pid_t::try_from(command.spawn().unwrap().id()).unwrap();
        let mut stops = 0;
        loop {
            let (status, faults) = wait(process);
            if !libc::WIFSTOPPED(status) {
                assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:x}");
                // One stop at the beginning and one at the end of each call.
                return Self { system_calls: stops / 2, faults };
            }
            let deliver = match libc::WSTOPSIG(status) {
                SIGTRAP => {
                    trace(libc::PTRACE_SETOPTIONS, process, libc::PTRACE_O_TRACESYSGOOD);
                    0
                }
                signal if signal == SIGTRAP | 0x80 => {
                    stops += 1;
                    0
                }
                signal => signal,
            };
            trace(libc::PTRACE_SYSCALL, process, deliver);
        }
    }
}

/// The next change of the process, and the page faults that it has had if it ended.
fn wait(process: pid_t) -> (c_int, i64) {
    let mut status = 0;
    // SAFETY: plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live places of the right type.
    let waited = unsafe { libc::wait4(process, &raw mut status, libc::__WALL, &raw mut usage) };
    assert_eq!(waited, process, "{}", io::Error::last_os_error());
    (status, usage.ru_minflt)
}

fn trace(request: libc::c_uint, process: pid_t, data: c_int) {
    // SAFETY: the requests used here take a number in place of the last pointer and ignore the other.
    let result = unsafe { libc::ptrace(request, process, ptr::null_mut::<u8>(), i64::from(data)) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
