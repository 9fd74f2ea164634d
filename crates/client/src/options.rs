//! What a region is to be, and why it cannot.

use std::io;
use std::path::PathBuf;

use farmem_pager::{Fatal, MemoryError};
use farmem_region::StoreError;
use farmem_transport::Endpoint;

/// Local memory of a region unless said otherwise: 64 MiB.
const CACHE_SIZE: u64 = 64 << 20;
/// Longest run of read-ahead unless said otherwise: 256 KiB.
const READAHEAD_PAGES: u32 = 64;

/// When [`Region::write`](crate::Region::write) reaches the memory server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WritePolicy {
    /// Before `write` returns: the server has acknowledged it then.
    WriteThrough,
    /// At the latest with [`flush`](crate::Region::flush); earlier when a quarter of the cache is
    /// waiting to be written.
    WriteBack,
}

/// What a region is to be.
#[derive(Debug, Clone)]
pub struct RegionOptions {
    /// The memory server.
    pub server: Endpoint,
    /// Bytes of the region.
    pub size: u64,
    /// Bytes of local memory that it may use, for the cache and for the mapping alike.
    pub cache_size: u64,
    /// When writes reach the server.
    pub write: WritePolicy,
    /// Pages that are fetched ahead of a sequence at most; 0: none.
    pub readahead_pages: u32,
    /// A directory for what the server has no room for.
    pub spill: Option<PathBuf>,
    /// What the server's log and listings call it.
    pub name: String,
}

impl RegionOptions {
    /// A region of `size` bytes: 64 MiB of local memory, write-through.
    #[must_use]
    pub fn new(server: Endpoint, size: u64) -> Self {
        Self {
            server,
            size,
            cache_size: CACHE_SIZE,
            write: WritePolicy::WriteThrough,
            readahead_pages: READAHEAD_PAGES,
            spill: None,
            name: "farmem library".to_owned(),
        }
    }
}

/// What can go wrong with a region.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The memory server, or the disk beside it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such place in the region.
    #[error(
        "{bytes} bytes from offset {offset} on do not lie in the region, which has {size} bytes"
    )]
    OutOfBounds {
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Bytes of the region.
        size: u64,
    },
    /// The address lies elsewhere.
    #[error("external address {address:#x} does not lie in this region")]
    NotHere {
        /// The address as a number.
        address: u64,
    },
    /// What is moved out of a mapping is written to the region, which a snapshot refuses.
    #[error(
        "region {name} is a snapshot, which can be read but not mapped; clone it, and map the clone"
    )]
    Frozen {
        /// Its name.
        name: String,
    },
    /// A forked child has the value, but the connection is its parent's.
    #[error(
        "the region belongs to the process {maker}, from which this one was forked; open one here"
    )]
    Forked {
        /// The process that made it.
        maker: i32,
    },
    /// A named region lives on its server alone.
    #[error(
        "region {name} has a name and lives on its server: a spill directory is for regions that are \
         made without one"
    )]
    NoSpill {
        /// Its name.
        name: String,
    },
    /// Between operations the connection is a thread's.
    #[error("cannot start the thread that keeps a region's connection: {source}")]
    Keeper {
        /// What the system said.
        source: io::Error,
    },
    /// This process cannot page memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The region cannot be mapped.
    #[error("cannot map a region of {bytes} bytes: {source}")]
    Map {
        /// Bytes of the region.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// Each page of a region that is made from a file, or filled with another byte than zero, is known to the pager
    /// from the start.
    #[error(
        "cannot map a region of {bytes} bytes that is made from a file, or filled with another byte than \
         zero: the table of its pages would take {table_bytes} bytes of memory from the start; such a \
         region may have {most} bytes at most. Read and write it at offsets, or make smaller regions"
    )]
    TooLarge {
        /// Bytes of the region.
        bytes: u64,
        /// Bytes of the table.
        table_bytes: u64,
        /// Bytes of the largest such region that can be mapped.
        most: u64,
    },
    /// The kernel refuses to report faults of the mapping.
    #[error("the kernel does not let this process page the mapping; run `farmem doctor`")]
    NotRegistered,
    /// Paging came to an end.
    #[error(transparent)]
    Pager(#[from] Fatal),
    /// The kernel holds pages of the mapping.
    #[error(
        "{pages} pages of the mapping are held by the kernel (direct input or output into them) \
         and were not flushed; flush again when that has ended"
    )]
    Pinned {
        /// How many.
        pages: u64,
    },
    /// The pager thread has ended, which it has said why on standard error.
    #[error("the pager thread of the region has ended")]
    NoPager,
}
