//! The words that every other crate speaks: page arithmetic, identifiers, the 64-bit external
//! address with configurable widths, and [`PageStore`], the one trait through which pages are
//! fetched and stored.
//!
//! This crate is pure: no sockets, no system calls, no clock. The pager and the network store
//! have never heard of each other; they meet here.

#![forbid(unsafe_code)]

mod address;
mod ids;
mod store;

pub use address::{AddressError, AddressWidths, ExternalAddress};
pub use ids::{
    BlockId, ByteCount, Checksum, Epoch, FrameId, Incarnation, Nanos, PAGE_SHIFT, PAGE_SIZE,
    PageCount, PageIndex, PageRange, RegionId, ServerId, SessionId, Version,
};
pub use store::{
    Completion, Errand, FetchPage, Frames, Lent, Loan, Outcome, PageStore, Readiness, Request,
    StoreError, StorePage, Ticket,
};
