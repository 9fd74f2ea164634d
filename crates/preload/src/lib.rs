//! The library that `farmem run` puts under every program of a run (LD_PRELOAD).
//!
//! It adds no thread, and replaces no function but `madvise` ([`advice`]). Its constructor makes the *watcher*: a process that
//! shares the program's memory and nothing else, which polls the resident size and, at three
//! quarters of the limit, turns itself into the pager by loading `farmem-pagerd` beside the program.
//!
//! ```text
//!  program --vfork--> intermediate --clone(VM)--> watcher ....> pager (farmem-pagerd)
//!     |                    | exits at once            |
//!     | goes on            '- so that the supervisor, not the program, becomes its parent
//! ```
//!
//! From the top: `constructor` (here) reads [`settings`], [`spawn`] makes the watcher,
//! [`watcher`] polls, [`image`] loads the pager, [`tell`] reports to the supervisor what cannot
//! be done, [`kernel`] holds the system calls.
//!
//! Rules of this crate, because it runs in processes that are not ours:
//! - the watcher has the program's thread pointer, so nothing here may use thread-local storage,
//!   `errno`, or any function of the C library; every system call is made directly;
//! - nothing allocates, and nothing is written to a descriptor of the program (it may be a pipe),
//!   but for one line on standard error when FARMEM_RUN is malformed;
//! - no symbol leaves the library but the constructor's entry and `madvise`, which only passes on.
//!
//! Linux on x86-64 only. `panic = "abort"` builds have no `std`; test harnesses are built with
//! unwinding, where the crate is compiled against `std` and never loaded.
#![cfg_attr(panic = "abort", no_std)]
#![expect(unsafe_code, reason = "this crate makes processes and loads an image by hand")]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("farmem-preload knows the system calls and start-up of Linux on x86-64 only");

mod advice;
mod freestanding;
mod image;
mod kernel;
mod settings;
mod spawn;
mod tell;
mod text;
mod watcher;

use core::ffi::c_char;

/// The dynamic linker calls this before `main` of the program.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(i32, *const *const c_char, *const *const c_char) = constructor;

extern "C" fn constructor(
    _argc: i32,
    _argv: *const *const c_char,
    environment: *const *const c_char,
) {
    // SAFETY: glibc calls constructors with the process's own argc, argv and envp; only one
    // thread exists yet, and nothing else touches the settings before this call.
    let read = unsafe { settings::read(environment) };
    match read {
        Ok(false) => {}
        Ok(true) => {
            spawn::watch_this_process();
            spawn::watch_forked_children();
        }
        Err(fault) => tell::complain(fault),
    }
}
