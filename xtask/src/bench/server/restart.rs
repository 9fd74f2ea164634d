//! How soon another process serves what one held that was killed.

use std::fs;

use anyhow::Context;
use serde::Serialize;

use super::serving::{GIB, Place, Server};
use crate::build::Built;

/// What the server has lent when it is killed, if the machine has room for that and for the rest...
const LENT: u64 = 8 * GIB;
/// ...or else.
const LENT_LEAST: u64 = 4 * GIB;
/// A region that is read from first, which is part of it.
const PART: u64 = GIB / 8;
/// How often it is killed; the median counts.
const ROUNDS: usize = 5;

#[derive(Debug, Serialize)]
pub(crate) struct Restart {
    /// Bytes that the killed server held.
    pub(crate) lent_bytes: u64,
    /// From the start of another process to the answer to its first read, each round.
    pub(crate) seconds: Vec<f64>,
}

impl Restart {
    /// Measures in a directory of the machine's memory.
    pub(crate) fn measure(built: &Built, quick: bool) -> anyhow::Result<Self> {
        let place = Place::new("/dev/shm")?;
        let lent = match quick {
            true => GIB / 4,
            false if available()? > LENT + 4 * GIB => LENT,
            false => LENT_LEAST,
        };
        let data = place.path("data");
        let mut server = Server::start(built, &place, lent + GIB / 4, &["--data", &data])?;
        server.fill("big", lent - PART)?;
        server.fill("part", PART)?;
        let read = ["region", "read", "part", "--range", "1MiB:4KiB"];
        let rounds = if quick { 1 } else { ROUNDS };
        let seconds = (0..rounds).map(|_| server.restart(&read)).collect::<Result<_, _>>()?;
        Ok(Self { lent_bytes: lent, seconds })
    }
}

/// Bytes of memory that are available.
fn available() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let words =
        line.and_then(|line| line.split_ascii_whitespace().next()).context("MemAvailable")?;
    Ok(words.parse::<u64>()? << 10)
}
