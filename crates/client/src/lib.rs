//! farmem for programs that use it directly: a [`Region`] of external memory, read and written at
//! offsets through a local cache, or [mapped](Region::map) and used as ordinary memory.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let server = farmem_memserver::MemServer::bind(farmem_memserver::ServerConfig::new(
//! #     vec!["127.0.0.1:0".parse::<farmem_transport::ServerAddress>()?.resolve()?],
//! #     farmem_region::ByteCount::new(64 << 20),
//! # ))?;
//! # let endpoint = server.endpoints().next().unwrap().clone();
//! # std::thread::spawn(move || server.run());
//! use farmem_client::{Region, RegionOptions, WritePolicy};
//!
//! let mut options = RegionOptions::new(endpoint, 16 << 20);
//! options.cache_size = 1 << 20;
//! options.write = WritePolicy::WriteBack;
//! let mut region = Region::create(options)?;
//! region.write(5_000_000, b"far away")?;
//! let mut bytes = [0; 8];
//! region.read(5_000_000, &mut bytes)?;
//! assert_eq!(&bytes, b"far away");
//! region.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! A region that was made with a name (`farmem region create`) is there for every program that
//! [opens](Region::open) it:
//!
//! ```
//! # use std::time::Duration;
//! # use farmem_region::ByteCount;
//! # use farmem_wire::{Create, Source};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let server = farmem_memserver::MemServer::bind(farmem_memserver::ServerConfig::new(
//! #     vec!["127.0.0.1:0".parse::<farmem_transport::ServerAddress>()?.resolve()?],
//! #     farmem_region::ByteCount::new(64 << 20),
//! # ))?;
//! # let endpoint = server.endpoints().next().unwrap().clone();
//! # std::thread::spawn(move || server.run());
//! # let create = Create {
//! #     name: "shared", size: ByteCount::new(8 << 20), page_bytes: 4096, source: Source::Fill(0),
//! #     prefers: None,
//! # };
//! # farmem_remote::named::create(&endpoint, &create, Duration::from_secs(5))?;
//! use farmem_client::{Region, RegionOptions};
//!
//! let options = RegionOptions::new(endpoint, 0);
//! let mut first = Region::open("shared", options.clone())?;
//! first.write(1_000, b"for whoever comes next")?;
//! let address = first.address(1_000).ok_or("it is in the first block")?;
//! first.close()?;
//!
//! let mut next = Region::open("shared", options)?;
//! let mut bytes = [0; 22];
//! next.read_address(address, &mut bytes)?;
//! assert_eq!(&bytes, b"for whoever comes next");
//! # Ok(())
//! # }
//! ```
//!
//! [`SpillStore`] puts a file beside a memory server: what the server has no room for goes there.
//! `farmem run` uses it too.

#![forbid(unsafe_code)]

mod cache;
mod exchange;
mod frames;
mod keeper;
mod mapped;
mod options;
mod region;
mod spill;

pub use cache::CacheCounts;
pub use farmem_region::{ExternalAddress, StoreError};
pub use farmem_transport::{Endpoint, ServerAddress};
pub use mapped::{MappedRegion, UnmapError};
pub use options::{RegionError, RegionOptions, WritePolicy};
pub use region::{MapError, Region};
pub use spill::{ProgramStore, SpillFile, SpillStore};
