//! The pager of one program: a process that shares the program's memory and moves its cold pages to
//! a memory server. It is loaded by the preload library; see [`runtime`].
#![cfg_attr(not(test), no_main)]
#![expect(unsafe_code, reason = "the pager's start-up and heap are its own, see runtime")]

mod pause;
mod run;
#[expect(dead_code, reason = "the probe in examples/ uses the rest")]
mod runtime;
mod sharers;
mod warden;

use run::run;
