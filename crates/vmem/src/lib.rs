//! userfaultfd, memory maps and the process plumbing that paging needs, as a safe interface.
//!
//! This crate is the only one that changes an address space. It decides nothing: which pages move
//! where is the pager's business. What it promises is that whatever the kernel answers is turned
//! into one of few outcomes in one place (see [`Stop`]), and that pager memory is reached only
//! while it is really there: touching a hole in memory that the toucher itself pages would make
//! it wait for itself.

#![expect(unsafe_code, reason = "system calls that change or map memory are this crate's job")]

mod anchor;
mod area;
mod arena;
mod errands;
mod fork_mark;
mod hold;
mod log;
mod madvise_watch;
mod maps;
mod pagemap;
mod porter;
mod probe;
mod process;
mod range;
mod scratch;
mod shared;
mod slices;
mod uffd;

pub use anchor::{
    Anchor, Lifeline, Pull, be_real_time, be_real_time_with_heirs, without_real_time,
};
pub use area::Area;
pub use arena::{Arena, Slot};
pub use errands::Errands;
pub use fork_mark::ForkMark;
pub use hold::Hold;
pub use log::MappedLog;
pub use madvise_watch::MadviseWatch;
pub use maps::{Mapping, MappingKind, ProcessMaps, registered_parts};
pub use pagemap::{PageKind, Pagemap, PresentRun};
pub use porter::Porter;
pub use probe::{Probe, probe};
pub use process::{
    ProcessHandle, ResidentMeter, Residents, ThreadWatch, processor_nanos, same_memory,
    shared_memory_bytes,
};
pub use range::AddressRange;
pub use scratch::Scratch;
pub use shared::SharedWords;
pub use uffd::{Event, Features, Look, Progress, Stop, Uffd, UffdError};
