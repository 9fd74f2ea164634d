//! `madvise`, the one function of the C library that this library stands in front of: it has the pager
//! told of guards.
//!
//! MADV_GUARD_INSTALL (Linux 6.13, see madvise(2)) drops pages without an event of userfaultfd. Of a
//! page that is out nobody would learn that its contents are gone: when the guard is removed it would
//! come back, where it must read as zeros. MADV_DONTNEED leaves guards alone, and is an event: it
//! makes the pager forget what was there. Everything else is passed on as it is.

use core::arch::global_asm;
use core::ffi::{c_int, c_void};

use crate::kernel::{self, Errno};

const GUARD_INSTALL: c_int = 102;
const DONT_NEED: c_int = 4;

/// As madvise(2). Takes no lock, and may be called in a signal handler.
#[cfg_attr(panic = "abort", unsafe(no_mangle))]
extern "C" fn madvise(start: *mut c_void, bytes: usize, advice: c_int) -> c_int {
    let mut done = kernel::madvise(start.addr(), bytes, advice);
    if advice == GUARD_INSTALL && done.is_ok() {
        // Locked memory refuses the first, and is never out.
        let _ = kernel::madvise(start.addr(), bytes, DONT_NEED);
        // What was on its way in when the first guard was set may have replaced it.
        done = kernel::madvise(start.addr(), bytes, GUARD_INSTALL);
    }
    match done {
        Ok(()) => 0,
        Err(Errno(error)) => {
            // SAFETY: the word is written by the dynamic linker before any constructor runs.
            if let Some(location) = unsafe { ERRNO_LOCATION } {
                // SAFETY: the C library's own function gives the calling thread's errno.
                unsafe { location().write(error) };
            }
            -1
        }
    }
}

unsafe extern "C" {
    /// The C library's `__errno_location`, or null where it has none.
    #[link_name = "farmem_errno_location"]
    static ERRNO_LOCATION: Option<unsafe extern "C" fn() -> *mut c_int>;
}

// As in [`crate::spawn`].
global_asm!(
    ".weak __errno_location",
    ".pushsection .data.rel.ro.farmem_errno_location, \"aw\", @progbits",
    ".balign 8",
    ".globl farmem_errno_location",
    ".hidden farmem_errno_location",
    "farmem_errno_location: .quad __errno_location",
    ".popsection",
);
