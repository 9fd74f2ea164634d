//! Counts how often it has been run, in a named region of a memory server: another process goes on
//! where the last one stopped.
//!
//! ```text
//! farmem serve --listen 127.0.0.1:7070 &
//! farmem region create counter --size 1MiB
//! cargo run -p farmem-client --example named 127.0.0.1:7070 counter
//! ```

#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::error::Error;

use farmem_client::{Region, RegionOptions, ServerAddress};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(server), Some(name)) = (arguments.next(), arguments.next()) else {
        return Err("usage: named ADDR NAME".into());
    };
    let server = server.parse::<ServerAddress>()?.resolve()?;
    let mut region = Region::open(&name, RegionOptions::new(server, 0))?;
    let mut number = [0; 8];
    region.read(0, &mut number)?;
    let number = u64::from_le_bytes(number) + 1;
    region.write(0, &number.to_le_bytes())?;
    println!("run {number}, in a region of {} bytes", region.size());
    Ok(region.close()?)
}
