//! All that was measured of the servers, and the table and JSON of it.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::backup::Backup;
use super::bars::Verdict;
use super::capacity::Capacity;
use super::contestants::{Absence, Server};
use super::restart::Restart;
use super::tables::Tables;
use super::tiers::Tiers;
use crate::bench::figures::median;

/// How a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Way {
    /// Pages of each request.
    pub(crate) pages: usize,
    /// Requests under way.
    pub(crate) depth: usize,
}

impl Way {
    pub(crate) const ALL: [Self; 7] = [
        Self::one_page(1),
        Self::one_page(8),
        Self::ONE_PAGE,
        Self::one_page(128),
        Self::MANY_PAGES,
        Self::MEBIBYTE_ALONE,
        Self::MEBIBYTE,
    ];
    /// One page a request, as the bar counts it.
    pub(crate) const ONE_PAGE: Self = Self::one_page(32);
    /// Many pages a request.
    pub(crate) const MANY_PAGES: Self = Self { pages: 64, depth: 8 };
    /// 1 MiB a request, and the next one asked for only then.
    const MEBIBYTE_ALONE: Self = Self { pages: 256, depth: 1 };
    /// 1 MiB a request.
    pub(crate) const MEBIBYTE: Self = Self { pages: 256, depth: 4 };

    const fn one_page(depth: usize) -> Self {
        Self { pages: 1, depth }
    }

    /// As `pageload` is told.
    pub(crate) fn argument(self) -> String {
        format!("{}x{}", self.depth, self.pages)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, depth } = self;
        let unit = if *pages == 1 { "page" } else { "pages" };
        f.pad(&format!("{pages} {unit} a request, {depth} under way"))
    }
}

/// What `pageload` printed about one way.
#[derive(Deserialize)]
pub(crate) struct Figure {
    pages: usize,
    depth: usize,
    pub(crate) pages_per_second: f64,
    server_us_per_page: Option<f64>,
}

impl Figure {
    pub(crate) const fn way(&self) -> Way {
        Way { pages: self.pages, depth: self.depth }
    }
}

/// What large empty regions of farmem cost, as `pageload` printed it: medians of one round.
#[derive(Deserialize, Serialize)]
pub(crate) struct Regions {
    /// To make one of 1 TiB.
    create_ms: f64,
    /// To copy it virtually.
    clone_ms: f64,
    /// To read a page that was never touched.
    first_touch_us: f64,
    /// To read a page that is there.
    present_touch_us: f64,
    /// The same of a region that is made from a file.
    file_first_touch_us: f64,
    file_present_touch_us: f64,
}

/// What farmem is compared with.
const COMPARATORS: [Server; 2] = [Server::Memcached, Server::Redis];

/// All figures.
#[derive(Default)]
pub(crate) struct Figures {
    of: BTreeMap<(Way, Server), Vec<Figure>>,
    streams: Vec<f64>,
    regions: Vec<Regions>,
    /// Who was asked for, and is not there.
    pub(super) absent: BTreeMap<Server, Absence>,
    pub(super) tables: Option<Tables>,
    pub(super) tiers: Option<Tiers>,
    pub(super) capacity: Option<Capacity>,
    pub(super) restart: Option<Restart>,
    pub(super) backup: Option<Backup>,
}

impl Figures {
    pub(crate) fn add(&mut self, server: Server, figure: Figure) {
        self.of.entry((figure.way(), server)).or_default().push(figure);
    }

    pub(crate) fn add_stream(&mut self, bytes_per_second: f64) {
        self.streams.push(bytes_per_second);
    }

    /// How many times the most that it had in memory a server served by compression alone, and with a file.
    pub(crate) fn times_memory(&self) -> Option<(f64, f64)> {
        let capacity = self.capacity.as_ref()?;
        Some((capacity.compressed.times_resident(), capacity.file.times_resident()))
    }

    /// How long another process takes to serve what one held that was killed.
    pub(crate) fn restart_seconds(&self) -> Option<f64> {
        median(self.restart.as_ref()?.seconds.clone())
    }

    /// The rates of backups as parts of the rates at which the directory takes files: in memory, and on
    /// a disk.
    pub(crate) fn backup_of_file(&self) -> Option<(f64, f64)> {
        let backup = self.backup.as_ref()?;
        median(backup.memory.ratios().collect()).zip(median(backup.disk.ratios().collect()))
    }

    pub(crate) fn add_regions(&mut self, regions: Regions) {
        self.regions.push(regions);
    }

    /// Milliseconds to make a region of 1 TiB.
    pub(crate) fn create_ms(&self) -> Option<f64> {
        median(self.regions.iter().map(|regions| regions.create_ms).collect())
    }

    /// Milliseconds to copy it virtually.
    pub(crate) fn clone_ms(&self) -> Option<f64> {
        median(self.regions.iter().map(|regions| regions.clone_ms).collect())
    }

    /// Microseconds of a first touch, and of another one.
    pub(crate) fn touches_us(&self) -> Option<(f64, f64)> {
        let first = median(self.regions.iter().map(|regions| regions.first_touch_us).collect());
        let later = median(self.regions.iter().map(|regions| regions.present_touch_us).collect());
        first.zip(later)
    }

    /// The same of a region that is made from a file.
    pub(crate) fn file_touches_us(&self) -> Option<(f64, f64)> {
        let regions = || self.regions.iter();
        let first = median(regions().map(|regions| regions.file_first_touch_us).collect());
        first.zip(median(regions().map(|regions| regions.file_present_touch_us).collect()))
    }

    /// Median pages a second.
    pub(crate) fn rate(&self, server: Server, way: Way) -> Option<f64> {
        let figures = self.of.get(&(way, server))?;
        median(figures.iter().map(|figure| figure.pages_per_second).collect())
    }

    /// Median bytes a second of the plain stream.
    pub(crate) fn stream(&self) -> Option<f64> {
        median(self.streams.clone())
    }

    /// The rate of the better of the two that farmem is compared with: of one alone nobody knows whether
    /// it is that.
    pub(crate) fn better(&self, way: Way) -> Option<f64> {
        let rate = |server| self.rate(server, way).filter(|_| !self.absent.contains_key(&server));
        let [memcached, redis] = COMPARATORS.map(rate);
        Some(memcached?.max(redis?))
    }

    /// Why there is no [`Figures::better`], and whether one of them failed.
    pub(crate) fn why_no_better(&self) -> Option<(String, bool)> {
        let absent = || COMPARATORS.iter().filter_map(|server| self.absent.get_key_value(server));
        let texts: Vec<String> =
            absent().map(|(server, absence)| format!("{server} {absence}")).collect();
        let failed = absent().any(|(_, absence)| *absence != Absence::NotInstalled);
        (!texts.is_empty()).then(|| (texts.join(", "), failed))
    }

    pub(crate) fn table(&self) -> String {
        let mut table = String::new();
        if !self.of.is_empty() {
            self.tell_reads(&mut table);
        }
        self.tell_regions(&mut table);
        self.tell_parts(&mut table);
        table
    }

    fn tell_reads(&self, table: &mut String) {
        let _ = writeln!(
            table,
            "{:34} {:10} {:>12}   {:29} {:>8} {:>10}",
            "how", "server", "pages/s", "(least .. most)", "GB/s", "cpu us/page"
        );
        for ((way, server), figures) in &self.of {
            let rates = || figures.iter().map(|figure| figure.pages_per_second);
            let middle = median(rates().collect()).unwrap_or(0.0);
            let least = rates().reduce(f64::min).unwrap_or(middle);
            let most = rates().reduce(f64::max).unwrap_or(middle);
            let cpu = median(figures.iter().filter_map(|f| f.server_us_per_page).collect());
            let range = format!("({least:.0} .. {most:.0})");
            let _ = writeln!(
                table,
                "{way:34} {server:10} {middle:12.0}   {range:29} {:8.2} {:10.2}",
                middle * 4096.0 / 1e9,
                cpu.unwrap_or(0.0)
            );
        }
        if let Some(stream) = self.stream() {
            let _ = writeln!(table, "one plain TCP stream: {:.2} GB/s", stream / 1e9);
        }
    }

    fn tell_regions(&self, table: &mut String) {
        if let (Some(create), Some(clone), Some((first, later))) =
            (self.create_ms(), self.clone_ms(), self.touches_us())
        {
            let _ = writeln!(
                table,
                "a region of 1 TiB: made in {create:.3} ms, copied in {clone:.3} ms; \
                 first touch {first:.1} us, of a present page {later:.1} us"
            );
        }
        if let Some((first, later)) = self.file_touches_us() {
            let _ = writeln!(
                table,
                "a region of a file in memory: first touch {first:.1} us, of a present page {later:.1} us"
            );
        }
    }

    /// What was measured of a server by itself.
    fn tell_parts(&self, table: &mut String) {
        if let Some(tables) = &self.tables {
            let _ = writeln!(
                table,
                "tables: {} KiB for 1 TiB that is not used and a copy of it, {:.2} bytes a page for 4 GiB that is",
                tables.empty_bytes >> 10,
                tables.bytes_per_page
            );
        }
        if let Some(restart) = &self.restart {
            let _ = writeln!(
                table,
                "with {:.1} GiB lent: served again after {:.3?} s",
                restart.lent_bytes as f64 / f64::from(1 << 30),
                restart.seconds
            );
        }
        if let Some(backup) = &self.backup {
            for (place, rates) in [("memory", &backup.memory), ("a disk", &backup.disk)] {
                let _ = writeln!(
                    table,
                    "to {place}: backup {:.2?} GB/s, a file {:.2?} GB/s",
                    in_gb(&rates.backup),
                    in_gb(&rates.file)
                );
            }
        }
        if let Some(capacity) = &self.capacity {
            for (how, held) in
                [("compressed", &capacity.compressed), ("and a file", &capacity.file)]
            {
                let gibibytes = |bytes: u64| bytes as f64 / f64::from(1 << 30);
                let _ = writeln!(
                    table,
                    "{:.2} GiB of memory, {how}: {:.2} GiB written in {:.1} s, read in {:.1} s, \
                     at most {:.2} GiB resident",
                    gibibytes(capacity.memory_bytes),
                    gibibytes(held.bytes),
                    held.write_seconds,
                    held.read_seconds,
                    gibibytes(held.resident_peak_bytes)
                );
            }
        }
    }

    /// Everything, for other programs.
    pub(crate) fn json(&self, verdicts: &[Verdict], quick: bool) -> anyhow::Result<String> {
        let line = |((way, server), figures): (&(Way, Server), &Vec<Figure>)| -> Value {
            json!({
                "server": server, "depth": way.depth, "pages_per_request": way.pages,
                "median_pages_per_second": self.rate(*server, *way),
                "pages_per_second":
                    figures.iter().map(|figure| figure.pages_per_second).collect::<Vec<_>>(),
                "server_us_per_page":
                    figures.iter().map(|figure| figure.server_us_per_page).collect::<Vec<_>>(),
            })
        };
        let whole = json!({
            "quick": quick,
            "figures": self.of.iter().map(line).collect::<Vec<_>>(),
            "absent": self.absent,
            "tcp_stream_bytes_per_second": self.streams, "regions": self.regions,
            "tables": self.tables, "tiers": self.tiers, "capacity": self.capacity,
            "restart": self.restart, "backup": self.backup,
            "bars": verdicts,
        });
        serde_json::to_string_pretty(&whole).context("write the figures as JSON")
    }
}

fn in_gb(rates: &[f64]) -> Vec<f64> {
    rates.iter().map(|rate| rate / 1e9).collect()
}
