//! All that was measured of the servers, and the table and JSON of it.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::bars::Verdict;
use super::contestants::Server;
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

/// All figures.
#[derive(Default)]
pub(crate) struct Figures {
    of: BTreeMap<(Way, Server), Vec<Figure>>,
    streams: Vec<f64>,
}

impl Figures {
    pub(crate) fn add(&mut self, server: Server, figure: Figure) {
        self.of.entry((figure.way(), server)).or_default().push(figure);
    }

    pub(crate) fn add_stream(&mut self, bytes_per_second: f64) {
        self.streams.push(bytes_per_second);
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

    /// The rate of the better of the two that farmem is compared with.
    pub(crate) fn better(&self, way: Way) -> Option<f64> {
        let rates = [Server::Memcached, Server::Redis].map(|server| self.rate(server, way));
        rates.into_iter().flatten().reduce(f64::max)
    }

    pub(crate) fn table(&self) -> String {
        let mut table = format!(
            "{:34} {:10} {:>12}   {:29} {:>8} {:>10}\n",
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
        table
    }

    /// Everything, for other programs.
    pub(crate) fn json(
        &self,
        verdicts: &[Verdict],
        rounds: usize,
        quick: bool,
    ) -> anyhow::Result<String> {
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
            "rounds": rounds, "quick": quick,
            "figures": self.of.iter().map(line).collect::<Vec<_>>(),
            "tcp_stream_bytes_per_second": self.streams,
            "bars": verdicts,
        });
        serde_json::to_string_pretty(&whole).context("write the figures as JSON")
    }
}
