//! How fast a region goes to a backup, beside a file of the same length that is written to the same
//! directory by one thread, large writes and fsync.
//!
//! Memory that the machine has not used yet, and blocks that its disk has not, are several times as
//! slow as others. So the first of each does not count, and each backup has a file before it and another
//! one after it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::serving::{GIB, Place, Server};
use crate::build::Built;

/// The region that is backed up.
const BYTES: u64 = GIB;
const ROUNDS: usize = 5;

#[derive(Debug, Serialize)]
pub(crate) struct Backup {
    /// In a file system of the machine's memory.
    pub(crate) memory: Rates,
    /// On a disk.
    pub(crate) disk: Rates,
}

/// Bytes a second.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Rates {
    pub(crate) backup: Vec<f64>,
    /// Of the files before and after each backup, the mean.
    pub(crate) file: Vec<f64>,
}

impl Backup {
    pub(crate) fn measure(built: &Built, quick: bool) -> anyhow::Result<Self> {
        let rates = |parent| Rates::measure(built, quick, parent);
        Ok(Self { memory: rates("/dev/shm")?, disk: rates("/var/tmp")? })
    }
}

impl Rates {
    fn measure(built: &Built, quick: bool, parent: &str) -> anyhow::Result<Self> {
        let place = Place::new(parent)?;
        let bytes = if quick { BYTES / 8 } else { BYTES };
        let allowed = place.0.display().to_string();
        // For the snapshot that a backup is made from.
        let options = ["--promise-ratio", "2", "--allow-dir", &allowed];
        let server = Server::start(built, &place, bytes + GIB / 4, &options)?;
        server.fill("all", bytes)?;
        let file = place.0.join("file");
        write_file(&file, bytes)?;
        back_up(&server, &place, bytes)?;
        let mut rates = Self::default();
        let mut before = write_file(&file, bytes)?;
        for _ in 0..if quick { 1 } else { ROUNDS } {
            rates.backup.push(back_up(&server, &place, bytes)?);
            let after = write_file(&file, bytes)?;
            // Two times of the same work.
            rates.file.push(2.0 / (1.0 / before + 1.0 / after));
            before = after;
        }
        Ok(rates)
    }

    /// Of each backup, to the files beside it.
    pub(crate) fn ratios(&self) -> impl Iterator<Item = f64> {
        self.backup.iter().zip(&self.file).map(|(backup, file)| backup / file)
    }
}

fn back_up(server: &Server, place: &Place, bytes: u64) -> anyhow::Result<f64> {
    let path = place.path("backup");
    let began = Instant::now();
    server.ask(&["region", "backup", "all", &path])?;
    let rate = bytes as f64 / began.elapsed().as_secs_f64();
    fs::remove_dir_all(&path)?;
    Ok(rate)
}

/// Bytes a second at which the directory takes a file.
fn write_file(path: &Path, bytes: u64) -> anyhow::Result<f64> {
    let block = vec![0x5a_u8; 1 << 20];
    let began = Instant::now();
    let mut file = File::create(path)?;
    for _ in (0..bytes).step_by(block.len()) {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let rate = bytes as f64 / began.elapsed().as_secs_f64();
    drop(file);
    fs::remove_file(path)?;
    Ok(rate)
}
