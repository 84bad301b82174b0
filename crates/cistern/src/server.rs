//! The stock server that the plugin was built for: where its parts are.
//!
//! `make build` writes `server.env` beside the plugin, because a plugin fits exactly one patch level of mariadbd.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Paths of the server and of our plugin.
#[derive(Debug)]
pub struct Server {
    /// The program.
    pub mariadbd: PathBuf,
    /// Messages, character sets and the scripts that make the system tables.
    pub share: PathBuf,
    /// Links to its own plugins and to ours: mariadbd knows one plugin directory only.
    pub plugins: PathBuf,
}

impl Server {
    /// Reads `server.env` in `directory`, the directory of this program.
    ///
    /// # Errors
    /// A sentence that says which file is missing and how to get it.
    pub fn beside(directory: &Path) -> Result<Self, String> {
        let file = directory.join("server.env");
        let text = std::fs::read_to_string(&file)
            .map_err(|error| format!("{}: {error}; `make build` writes it", file.display()))?;
        let values: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key, value.trim_matches(['"', '\''])))
            .collect();
        let value = |key: &str| {
            values
                .get(key)
                .copied()
                .ok_or_else(|| format!("{} has no line {key}=…; run `make build`", file.display()))
        };
        let server = Self {
            mariadbd: value("MARIADBD")?.into(),
            share: value("SHARE_DIR")?.into(),
            plugins: directory.join("plugins"),
        };
        for part in [&server.mariadbd, &server.share, &server.plugins.join("ha_cistern.so")] {
            if !part.exists() {
                return Err(format!("{} is missing; run `make build`", part.display()));
            }
        }
        Ok(server)
    }
}
