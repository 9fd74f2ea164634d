//! Uses external memory in both ways: at offsets through a cache, and mapped as ordinary memory.
//!
//! `cargo run -p farmem-client --example region [ADDR]`; without the address of a memory server
//! (HOST:PORT or unix:PATH) it starts one in this process.

#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::error::Error;
use std::time::Instant;

use farmem_client::{Endpoint, Region, RegionOptions, ServerAddress, WritePolicy};
use farmem_memserver::{MemServer, ServerConfig};
use farmem_region::ByteCount;

/// Bytes of the region, eight times its local memory.
const SIZE: u64 = 128 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let server = match std::env::args().nth(1) {
        Some(address) => address.parse::<ServerAddress>()?.resolve()?,
        None => start_server()?,
    };
    let mut options = RegionOptions::new(server, SIZE);
    options.cache_size = SIZE / 8;
    options.write = WritePolicy::WriteBack;
    let mut region = Region::create(options)?;

    // At offsets: no privilege needed.
    region.write(1_000_000, b"written at an offset")?;
    region.flush()?;
    if let Some(address) = region.address(1_000_000) {
        println!("offset 1000000 is external address {:#x}", address.raw());
    }

    // As memory: needs userfaultfd, see `farmem doctor`.
    if let Err(error) = farmem_vmem::Uffd::new(farmem_vmem::Features::Events) {
        println!("not mapped: {error}");
        return Ok(region.close()?);
    }
    let mut mapped = region.map()?;
    assert_eq!(&mapped.as_slice()[1_000_000..1_000_020], b"written at an offset");
    let started = Instant::now();
    for (number, page) in mapped.as_mut_slice().chunks_mut(4096).enumerate() {
        page[..8].copy_from_slice(&(number as u64).to_le_bytes());
    }
    let written = started.elapsed();
    let started = Instant::now();
    let sum: u64 = mapped.as_slice().chunks(4096).map(|page| u64::from(page[0])).sum();
    println!("wrote every page in {written:?}, read all in {:?}, sum {sum}", started.elapsed());

    // And at offsets again.
    let mut region = mapped.unmap()?;
    let mut number = [0; 8];
    region.read(77 * 4096, &mut number)?;
    assert_eq!(u64::from_le_bytes(number), 77);
    println!("cache: {:?}", region.counts());
    Ok(region.close()?)
}

fn start_server() -> Result<Endpoint, Box<dyn Error>> {
    let listen = "127.0.0.1:0".parse::<ServerAddress>()?.resolve()?;
    let server = MemServer::bind(ServerConfig::new(vec![listen], ByteCount::new(2 * SIZE)))?;
    let endpoint = server.endpoints().next().cloned().ok_or("it listens")?;
    std::thread::spawn(move || server.run());
    Ok(endpoint)
}
