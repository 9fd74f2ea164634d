//! A picture of the figures: for each the speed of every way of running, zram being one.

use std::fmt::Write;

use super::cases::What;
use super::figures::{Figures, Quantity};
use crate::stage::Variant;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 210.0;
const BAR: f64 = 16.0;
const GAP: f64 = 14.0;
const TOP: f64 = 56.0;

/// Draws an SVG. Bars are on a logarithmic scale from a tenth of zram's speed to a hundred times.
pub(crate) fn draw(figures: &Figures) -> String {
    let ways = [Variant::Unix, Variant::Tcp, Variant::Zram, Variant::SwapFile];
    let mut bars = String::new();
    let mut y = TOP;
    for what in figures.whats() {
        let speeds: Vec<_> =
            ways.iter().filter_map(|way| Some((*way, speed(figures, what, *way)?))).collect();
        if speeds.is_empty() {
            continue;
        }
        let middle = y + BAR * speeds.len() as f64 / 2.0 + 4.0;
        let _ =
            writeln!(bars, r#"<text x="8" y="{middle:.1}" class="name">{}</text>"#, what.name());
        for (way, speed) in speeds {
            let (x, colour) = (place(speed), colour(way));
            let (height, baseline) = (BAR - 2.0, y + BAR - 5.0);
            let width = x - LEFT;
            let _ = writeln!(
                bars,
                r#"<rect x="{LEFT}" y="{y:.1}" width="{width:.1}" height="{height}" fill="{colour}"/>
<text x="{:.1}" y="{baseline:.1}">{way} {speed:.2}</text>"#,
                x + 5.0
            );
            y += BAR;
        }
        y += GAP;
    }
    let (one, bottom) = (place(1.0), y);
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="11">
<style>.name {{ font-size: 13px; font-weight: bold }}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="8" y="22" font-size="16">Speed of paging, zram swap of the same run = 1 (logarithmic)</text>
<line x1="{one:.1}" y1="{TOP}" x2="{one:.1}" y2="{bottom:.1}" stroke="#999999" stroke-dasharray="3 3"/>
{bars}</svg>
"##,
        height = y + 8.0,
    )
}

/// Times the speed of zram.
fn speed(figures: &Figures, what: What, way: Variant) -> Option<f64> {
    let value = figures.of(what, way, Quantity::Value)?;
    let zram = figures.of(what, Variant::Zram, Quantity::Value)?;
    Some(if what.is_throughput() { value / zram } else { zram / value })
}

fn place(speed: f64) -> f64 {
    let decades = speed.clamp(0.1, 100.0).log10() + 1.0;
    LEFT + decades / 3.0 * (WIDTH - LEFT - 120.0)
}

const fn colour(way: Variant) -> &'static str {
    match way {
        Variant::Native => "#444444",
        Variant::Unix => "#1b7f5c",
        Variant::Tcp => "#4fb08b",
        Variant::Zram => "#c9803a",
        Variant::SwapFile => "#b0413e",
    }
}
