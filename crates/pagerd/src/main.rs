//! The pager of one program: a process that shares the program's memory and moves its cold pages to
//! a memory server. It is loaded by the preload library; see [`runtime`].
#![cfg_attr(not(test), no_main)]
#![expect(unsafe_code, reason = "the pager's start-up and heap are its own, see runtime")]

mod run;
#[expect(dead_code, unused_imports, reason = "the pager proper comes next and uses all of it")]
mod runtime;

use run::run;
