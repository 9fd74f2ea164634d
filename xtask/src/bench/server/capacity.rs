//! How much more than its memory a server serves: regions that are written as a whole and read back,
//! every byte compared, while the server has 1 GiB.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::serving::{GIB, PAGE_BYTES, Place, Server};
use crate::build::Built;

/// Memory of the server, unless it is to be quick.
const MEMORY: u64 = GIB;

/// What was found.
#[derive(Debug, Serialize)]
pub(crate) struct Capacity {
    pub(crate) memory_bytes: u64,
    /// With compressed pages alone, which compress to a sixth.
    pub(crate) compressed: Held,
    /// With a file too, and pages that compress to a half.
    pub(crate) file: Held,
}

/// A region that came back as it was.
#[derive(Debug, Serialize)]
pub(crate) struct Held {
    pub(crate) bytes: u64,
    pub(crate) write_seconds: f64,
    pub(crate) read_seconds: f64,
    /// The most that the server's process had in memory.
    pub(crate) resident_peak_bytes: u64,
}

impl Held {
    /// How many times what the server had in memory at most.
    pub(crate) fn times_resident(&self) -> f64 {
        self.bytes as f64 / self.resident_peak_bytes as f64
    }
}

impl Capacity {
    pub(crate) fn measure(built: &Built, quick: bool) -> anyhow::Result<Self> {
        let memory = if quick { MEMORY / 16 } else { MEMORY };
        // More than the bars ask for: tables and threads are in memory too.
        let (compressed_bytes, file_bytes) = (memory / 2 * 9, 10 * memory);
        let compressed = [format!("compressed={compressed_bytes}")];
        let compressed = hold(built, memory, compressed_bytes, 600, &compressed)?;
        let file = [format!("compressed={memory}"), format!("file=/var/tmp:{file_bytes}")];
        let file = hold(built, memory, file_bytes, 2000, &file)?;
        Ok(Self { memory_bytes: memory, compressed, file })
    }
}

/// Writes a region of so many bytes and reads it back.
fn hold(
    built: &Built,
    memory: u64,
    bytes: u64,
    noise: usize,
    tiers: &[String],
) -> anyhow::Result<Held> {
    let place = Place::new("/dev/shm")?;
    let options: Vec<&str> = tiers.iter().flat_map(|tier| ["--tier", tier]).collect();
    let server = Server::start(built, &place, memory, &options)?;
    server.ask(&["region", "create", "all", "--size", &bytes.to_string()])?;
    let mut content = Content::new(noise);
    let began = Instant::now();
    let mut write = server.farmem(&["region", "write", "all"]).stdin(Stdio::piped()).spawn()?;
    let mut input = write.stdin.take().context("no standard input")?;
    for start in (0..bytes).step_by(Content::BYTES) {
        input.write_all(content.block(start))?;
    }
    drop(input);
    ensure!(write.wait()?.success(), "cannot write {bytes} bytes");
    let write_seconds = began.elapsed().as_secs_f64();
    let began = Instant::now();
    let mut read = server.farmem(&["region", "read", "all"]).stdout(Stdio::piped()).spawn()?;
    let mut output = read.stdout.take().context("no standard output")?;
    let mut found = vec![0; Content::BYTES];
    for start in (0..bytes).step_by(Content::BYTES) {
        output.read_exact(&mut found).with_context(|| format!("read at byte {start}"))?;
        ensure!(found == content.block(start), "wrong bytes in the MiB at byte {start}");
    }
    ensure!(read.wait()?.success(), "cannot read {bytes} bytes");
    let read_seconds = began.elapsed().as_secs_f64();
    let resident_peak_bytes = server.status_bytes("VmHWM")?;
    Ok(Held { bytes, write_seconds, read_seconds, resident_peak_bytes })
}

/// Pages of which a part is noise and the rest zeros, no two alike.
struct Content {
    noise: Vec<u8>,
    bytes: usize,
    block: Vec<u8>,
}

impl Content {
    /// Bytes that are made at a time.
    const BYTES: usize = 1 << 20;

    fn new(bytes: usize) -> Self {
        let mut word = 1_u64;
        let mut next = || {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (word >> 56) as u8
        };
        // Each page takes its noise from another place.
        let noise = (0..1 << 20).map(|_| next()).collect();
        Self { noise, bytes, block: vec![0; Self::BYTES] }
    }

    fn block(&mut self, start: u64) -> &[u8] {
        let first = start / PAGE_BYTES as u64;
        for (page, content) in (first..).zip(self.block.chunks_mut(PAGE_BYTES)) {
            let room = self.noise.len() - self.bytes;
            let at = page.wrapping_mul(0x9e37_79b9) as usize % room;
            content[..self.bytes].copy_from_slice(&self.noise[at..at + self.bytes]);
            content[..8].copy_from_slice(&page.to_le_bytes());
        }
        &self.block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_has_in_memory_counts_not_what_it_was_given() {
        let (write_seconds, read_seconds) = (1.0, 1.0);
        let held =
            Held { bytes: 8 * GIB, write_seconds, read_seconds, resident_peak_bytes: 2 * GIB };
        assert!((held.times_resident() - 4.0).abs() < 1e-9);
    }
}
