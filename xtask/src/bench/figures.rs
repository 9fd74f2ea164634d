//! All that was measured, and the table and JSON of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Context;
use serde_json::{Value, json};

use super::bars::Verdict;
use super::cases::{Case, Run, What};
use crate::stage::Variant;

/// All figures, by what they are of and how the program was run.
#[derive(Default)]
pub(crate) struct Figures {
    runs: BTreeMap<(What, Variant), Vec<Run>>,
    streams: Vec<f64>,
    round_trips: Vec<f64>,
    bare_faults: Vec<f64>,
    failures: BTreeMap<(What, Variant), String>,
    skipped: BTreeMap<Variant, String>,
}

/// A quantity of which a bar speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quantity {
    /// The figure itself.
    Value,
    /// Processor time of program, pager and server for one unit of work.
    Cpu,
    /// The most that VmHWM was above the limit, in MiB, over all runs.
    ResidentAboveLimit,
    /// The most that RssAnon was above the limit, in MiB, over all runs.
    AnonymousAboveLimit,
}

impl Figures {
    pub(crate) fn add(&mut self, variant: Variant, runs: Vec<Run>) {
        for run in runs {
            self.runs.entry((run.what, variant)).or_default().push(run);
        }
    }

    pub(crate) fn add_stream(&mut self, gigabytes_per_second: f64) {
        self.streams.push(gigabytes_per_second);
    }

    pub(crate) fn add_round_trip(&mut self, microseconds: f64) {
        self.round_trips.push(microseconds);
    }

    pub(crate) fn add_bare_fault(&mut self, microseconds: f64) {
        self.bare_faults.push(microseconds);
    }

    pub(crate) fn skip(&mut self, variant: Variant, reason: &str) {
        self.skipped.insert(variant, reason.to_owned());
    }

    pub(crate) fn fail(&mut self, case: Case, variant: Variant, reason: &str) {
        for what in case.figures() {
            self.failures.insert((*what, variant), reason.to_owned());
        }
    }

    /// Why there is no figure, if it was tried and failed.
    pub(crate) fn failure(&self, what: What, variant: Variant) -> Option<&str> {
        self.failures.get(&(what, variant)).map(String::as_str)
    }

    pub(crate) fn whats(&self) -> Vec<What> {
        let measured = self.runs.keys().chain(self.failures.keys());
        let mut whats: Vec<What> = measured.map(|(what, _)| *what).collect();
        whats.sort_unstable();
        whats.dedup();
        whats
    }

    /// Median gigabytes a second of one plain TCP stream.
    pub(crate) fn stream(&self) -> Option<f64> {
        median(self.streams.clone())
    }

    /// The quantity, over all rounds.
    pub(crate) fn of(&self, what: What, variant: Variant, quantity: Quantity) -> Option<f64> {
        let runs = self.runs.get(&(what, variant))?;
        let above = |run: &Run, bytes: u64| (bytes as f64 - run.limit_bytes as f64) / 1048576.0;
        let largest = |values: Vec<f64>| values.into_iter().reduce(f64::max);
        match quantity {
            Quantity::Value => median(runs.iter().filter_map(|run| run.value).collect()),
            Quantity::Cpu => median(runs.iter().filter_map(|run| run.cpu_us_per_unit).collect()),
            Quantity::ResidentAboveLimit => {
                largest(runs.iter().map(|run| above(run, run.peak.resident_bytes)).collect())
            }
            Quantity::AnonymousAboveLimit => {
                largest(runs.iter().map(|run| above(run, run.peak.anonymous_bytes)).collect())
            }
        }
    }

    fn stat(&self, what: What, variant: Variant, name: &str) -> Option<f64> {
        let runs = self.runs.get(&(what, variant))?;
        let stats = runs.iter().filter_map(|run| run.stats.as_ref()?.get(name)?.as_f64());
        median(stats.collect())
    }

    /// One line for each figure and way of running.
    pub(crate) fn table(&self) -> String {
        let mut table = String::new();
        let head = "figure          way              median   (least .. most)          unit        \
                    cpu us/unit  peak MiB\n";
        table += head;
        for what in self.whats() {
            for variant in Variant::ALL {
                self.line(&mut table, what, variant);
            }
        }
        if let Some(stream) = self.stream() {
            let _ = writeln!(table, "one plain TCP stream over loopback: {stream:.2} GB/s");
        }
        if let Some(time) = median(self.round_trips.clone()) {
            let _ =
                writeln!(table, "one plain TCP round trip of a page, looked out for: {time:.1} us");
        }
        if let Some(time) = median(self.bare_faults.clone()) {
            let _ = writeln!(table, "one bare fault, handled on its own processor: {time:.1} us");
        }
        for (variant, reason) in &self.skipped {
            let _ = writeln!(table, "{variant}: skipped: {reason}");
        }
        table
    }

    fn line(&self, table: &mut String, what: What, variant: Variant) {
        if let Some(reason) = self.failure(what, variant) {
            let _ = writeln!(table, "{:15} {variant:12} failed: {reason}", what.name());
        }
        let Some(value) = self.of(what, variant, Quantity::Value) else {
            return;
        };
        let runs = &self.runs[&(what, variant)];
        let values = || runs.iter().filter_map(|run| run.value);
        let least = values().reduce(f64::min).unwrap_or(value);
        let most = values().reduce(f64::max).unwrap_or(value);
        let cpu = self.of(what, variant, Quantity::Cpu).unwrap_or(0.0);
        let peak = runs.iter().map(|run| run.peak.resident_bytes).max().unwrap_or(0) >> 20;
        let _ = writeln!(
            table,
            "{:15} {variant:12} {value:10.3}   ({least:.3} .. {most:.3})  {:12} {cpu:10.2}  {peak:8}",
            what.name(),
            what.unit(),
        );
    }

    /// How long faults took under farmem and where the time went: medians over the runs.
    pub(crate) fn latencies(&self) -> String {
        const PARTS: [(&str, &str); 5] = [
            ("seen", "seen by the program"),
            ("fault", "in the pager"),
            ("fault_network", "network"),
            ("fault_server", "server"),
            ("fault_install", "install"),
        ];
        let mut table = "fault latency in us: p50 / p99 / p99.9\n".to_owned();
        for (what, variant) in self.runs.keys().filter(|(_, variant)| variant.is_farmem()) {
            let _ = write!(table, "{:15} {variant:12}", what.name());
            for (histogram, name) in PARTS {
                let quantiles = ["p50", "p99", "p999"].map(|quantile| {
                    let stat = format!("{histogram}_{quantile}_us");
                    let found = self.stat(*what, *variant, &stat);
                    found.map_or_else(|| "-".to_owned(), |us| format!("{us:.1}"))
                });
                let _ = write!(table, "  {name} {}", quantiles.join("/"));
            }
            // What the pager cannot see: the fault, the switch to the pager, and the way back. While
            // it yields, the thread goes on before the pager's clock stops, which contains all that.
            let p50 = |stat| self.stat(*what, *variant, stat);
            if let (Some(seen), Some(pager)) = (p50("seen_p50_us"), p50("fault_p50_us"))
                && seen > pager
            {
                let _ = write!(table, "  wake-up {:.1} (p50)", seen - pager);
            }
            if let (What::Random, Some(seen), Some(limit)) =
                (*what, p50("seen_p50_us"), self.physical_limit(*variant))
            {
                let times = seen / limit;
                let _ = write!(table, "  {times:.2} times the physical limit of {limit:.1}");
            }
            table.push('\n');
        }
        table
    }

    /// What a fault cannot fall below, in microseconds: a bare fault, and over the network a round trip.
    fn physical_limit(&self, variant: Variant) -> Option<f64> {
        let fault = median(self.bare_faults.clone())?;
        match variant {
            Variant::Tcp => Some(fault + median(self.round_trips.clone())?),
            _ => Some(fault),
        }
    }

    /// Everything, for other programs.
    pub(crate) fn json(
        &self,
        verdicts: &[Verdict],
        rounds: usize,
        quick: bool,
    ) -> anyhow::Result<String> {
        let figures: Vec<Value> = self
            .runs
            .iter()
            .map(|((what, variant), runs)| {
                json!({
                    "figure": what, "way": variant, "unit": what.unit(),
                    "median": self.of(*what, *variant, Quantity::Value),
                    "values": runs.iter().map(|run| run.value).collect::<Vec<_>>(),
                    "cpu_us_per_unit": self.of(*what, *variant, Quantity::Cpu),
                    "limit_bytes": runs[0].limit_bytes,
                    "peaks": runs.iter().map(|run| run.peak).collect::<Vec<_>>(),
                    "stats": runs.iter().filter_map(|run| run.stats.clone()).collect::<Vec<_>>(),
                })
            })
            .collect();
        let failures: Vec<Value> = self.failures.iter().map(|((what, variant), reason)| {
            json!({ "figure": what, "way": variant, "reason": reason })
        }).collect();
        let whole = json!({
            "rounds": rounds, "quick": quick, "figures": figures, "failures": failures,
            "skipped": self.skipped, "tcp_stream_gigabytes_per_second": self.streams,
            "tcp_round_trip_microseconds": self.round_trips,
            "bare_fault_microseconds": self.bare_faults,
            "bars": verdicts,
        });
        serde_json::to_string_pretty(&whole).context("write the figures as JSON")
    }
}

/// The middle one; between two the mean.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 200.0]), Some(3.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 100.0]), Some(3.0));
    }
}
