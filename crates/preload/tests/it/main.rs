//! The preload library under real programs on the real kernel.
#![expect(unsafe_code, reason = "the harness makes itself a subreaper and signals programs")]

mod cost;
mod harness;
mod pager;
mod watcher;
