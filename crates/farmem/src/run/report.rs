//! What a run tells when it has ended: one line for people, and the `--stats` file.

use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use farmem_supervise::{ChildrenUsage, Counter, Histogram, StatsSnapshot};
use serde_json::{Map, Value, json};

use crate::run::Ending;
use crate::run::tally::{ProcessCounts, Tally};
use crate::size::Size;

/// Everything that is known at the end.
#[derive(Debug)]
pub(crate) struct Report {
    /// The local limit of the run.
    pub(crate) limit_bytes: u64,
    /// From the program's start to the end of the last process.
    pub(crate) wall: Duration,
    /// How the run ended.
    pub(crate) ending: Ending,
    /// What was counted.
    pub(crate) tally: Tally,
    /// What the program, its children and their pagers have used; no server.
    pub(crate) usage: ChildrenUsage,
}

/// The quantiles that are reported, as parts of a whole.
const QUANTILES: [(&str, u64, u64); 3] = [("p50", 1, 2), ("p99", 99, 100), ("p999", 999, 1000)];

/// Counters that name a cause why memory could not be paged, with a word for people.
const UNPAGEABLE: [(Counter, &str); 3] = [
    (Counter::UnpageableSharedBytes, "shared"),
    (Counter::UnpageableForeignBytes, "of a userfaultfd of its own"),
    (Counter::UnpageableFileBytes, "files"),
];

impl Report {
    /// One line.
    pub(crate) fn summary(&self) -> String {
        let local = format!("local peak {} of {}", Size(self.local_peak()), Size(self.limit_bytes));
        if self.tally.processes().is_empty() {
            return format!("{local}, nothing went out");
        }
        let sum = self.tally.sum();
        let external = Size(self.tally.external_peak_bytes());
        let faults = sum.get(Counter::Faults);
        let mut line = format!("{local}, external peak {external}, {faults} faults");
        if let Some(ratio) = hit_ratio(&sum) {
            line.push_str(&format!(", {:.1} % hits", ratio * 100.0));
        }
        let unpageable: Vec<String> = UNPAGEABLE
            .iter()
            .map(|&(cause, word)| (self.tally.most(cause), word))
            .filter(|&(bytes, _)| bytes > 0)
            .map(|(bytes, word)| format!("{word} {}", Size(bytes)))
            .collect();
        if !unpageable.is_empty() {
            line.push_str(&format!("; cannot be paged: {}", unpageable.join(", ")));
        }
        line
    }

    /// Writes the `--stats` file.
    pub(crate) fn write_json(&self, mut file: File) -> io::Result<()> {
        serde_json::to_writer_pretty(&file, &self.json())?;
        file.write_all(b"\n")
    }

    fn json(&self) -> Value {
        let mut fields = counts(&self.tally.sum());
        fields.insert("local_limit_bytes".to_owned(), json!(self.limit_bytes));
        fields.insert("local_peak_bytes".to_owned(), json!(self.local_peak()));
        let external_peak = self.tally.external_peak_bytes();
        fields.insert("external_peak_bytes".to_owned(), json!(external_peak));
        fields.insert("wall_seconds".to_owned(), json!(self.wall.as_secs_f64()));
        let processor_seconds = self.usage.processor_time.as_secs_f64();
        fields.insert("processor_seconds".to_owned(), json!(processor_seconds));
        fields.insert("exit_status".to_owned(), json!(self.ending.status()));
        let processes: Vec<Value> = self.tally.processes().iter().map(process).collect();
        fields.insert("processes".to_owned(), Value::Array(processes));
        Value::Object(fields)
    }

    /// Where no process came near the limit, or its pager failed at once, nobody but the kernel has
    /// measured: it remembers the largest single process.
    fn local_peak(&self) -> u64 {
        match self.tally.local_peak_bytes() {
            // None had a pager, or none for long enough to measure.
            0 => self.usage.resident_peak_bytes,
            peak => peak,
        }
    }
}

fn process(process: &ProcessCounts) -> Value {
    let mut fields = counts(&process.counts);
    fields.insert("pid".to_owned(), json!(process.pid));
    fields.insert("name".to_owned(), json!(process.name));
    let limit = process.counts.get(Counter::LimitBytes);
    fields.insert("local_limit_bytes".to_owned(), json!(limit));
    Value::Object(fields)
}

/// All counters but those that only say what is now, and the quantiles of all latencies, which
/// are 0 where there was none.
fn counts(snapshot: &StatsSnapshot) -> Map<String, Value> {
    const PRESENT: [Counter; 4] =
        [Counter::LimitBytes, Counter::ResidentBytes, Counter::ExternalBytes, Counter::VictimPages];
    let mut fields = Map::new();
    for &counter in Counter::ALL.iter().filter(|counter| !PRESENT.contains(counter)) {
        fields.insert(counter.name().to_owned(), json!(snapshot.get(counter)));
    }
    for &histogram in Histogram::ALL {
        let latencies = snapshot.histogram(histogram);
        for (name, parts, of) in QUANTILES {
            let micros = latencies.quantile(parts, of).unwrap_or(0) as f64 / 1_000.0;
            fields.insert(format!("{}_{name}_us", histogram.name()), json!(micros));
        }
    }
    fields
}

/// Of all the times that a page was needed which had been out, how often it was there without
/// waiting for the network: read ahead, or still in the victim buffer.
fn hit_ratio(snapshot: &StatsSnapshot) -> Option<f64> {
    let ahead = snapshot.get(Counter::ReadaheadHits);
    let hits = ahead + snapshot.get(Counter::VictimHits);
    let needed = ahead + snapshot.get(Counter::Faults);
    (needed > 0).then(|| hits.min(needed) as f64 / needed as f64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use farmem_supervise::{StatsLayout, StatsWriter};

    use super::*;

    /// What a pager with these counts would have shared.
    fn snapshot(counts: &[(Counter, u64)], fault_nanos: u64) -> StatsSnapshot {
        let words: Vec<AtomicU64> = (0..StatsLayout::WORDS).map(|_| AtomicU64::new(0)).collect();
        let writer = StatsWriter::new(&words);
        counts.iter().for_each(|&(counter, count)| writer.set(counter, count));
        writer.record(Histogram::Fault, fault_nanos);
        let bytes: Vec<u8> =
            words.into_iter().flat_map(|word| word.into_inner().to_le_bytes()).collect();
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        StatsSnapshot::read(&file).unwrap()
    }

    fn report(processes: &[(u32, StatsSnapshot)]) -> Report {
        let mut tally = Tally::default();
        for (pid, counts) in processes {
            let counts = counts.clone();
            tally.ended(ProcessCounts { pid: *pid, name: "sort".to_owned(), counts });
        }
        let ending = Ending::Signalled(9);
        Report {
            limit_bytes: 256 << 20,
            wall: Duration::from_millis(1500),
            ending,
            tally,
            usage: ChildrenUsage {
                resident_peak_bytes: 5 << 20,
                processor_time: Duration::from_millis(700),
            },
        }
    }

    #[test]
    fn the_file_has_the_sum_over_the_tree_at_the_top_and_each_process_below() {
        let one = [(Counter::Faults, 3), (Counter::LocalPeakBytes, 100)];
        let two = [(Counter::Faults, 4), (Counter::LocalPeakBytes, 70), (Counter::VictimHits, 2)];
        let mut report = report(&[(7, snapshot(&one, 20_000)), (8, snapshot(&two, 20_000))]);
        let both = [(Counter::ResidentBytes, 150), (Counter::ExternalBytes, 5)];
        report.tally.sample(&snapshot(&both, 0));
        let json = report.json();
        for name in [
            "local_limit_bytes",
            "local_peak_bytes",
            "external_peak_bytes",
            "faults",
            "fetched_pages",
            "readahead_pages",
            "readahead_hits",
            "evicted_pages",
            "written_pages",
            "victim_hits",
            "zero_pages",
            "fault_p50_us",
            "fault_p99_us",
            "wall_seconds",
            "exit_status",
        ] {
            assert!(json[name].is_number(), "{name}");
        }
        assert_eq!((&json["faults"], &json["victim_hits"]), (&json!(7), &json!(2)));
        assert_eq!(
            (&json["local_peak_bytes"], &json["external_peak_bytes"]),
            (&json!(150), &json!(5))
        );
        assert_eq!((&json["exit_status"], &json["wall_seconds"]), (&json!(137), &json!(1.5)));
        let p50 = json["fault_p50_us"].as_f64().unwrap();
        assert!((p50 - 20.0).abs() < 1.0, "{p50}");
        assert_eq!(json["fault_install_p50_us"], json!(0.0));
        assert_eq!(json["processes"][1]["pid"], json!(8));
        assert_eq!(json["processes"][1]["faults"], json!(4));
    }

    #[test]
    fn the_summary_tells_peaks_faults_hits_and_what_cannot_be_paged() {
        let counts = [
            (Counter::LocalPeakBytes, 255 << 20),
            (Counter::ExternalPeakBytes, 3 << 29),
            (Counter::Faults, 60),
            (Counter::VictimHits, 20),
            (Counter::ReadaheadHits, 40),
            (Counter::UnpageableSharedBytes, 2 << 20),
            (Counter::UnpageableFileBytes, 3 << 20),
        ];
        assert_eq!(
            report(&[(7, snapshot(&counts, 1))]).summary(),
            "local peak 255 MiB of 256 MiB, external peak 1.5 GiB, 60 faults, 60.0 % hits; cannot \
             be paged: shared 2 MiB, files 3 MiB"
        );
        assert!(report(&[]).summary().ends_with("of 256 MiB, nothing went out"));
    }
}
