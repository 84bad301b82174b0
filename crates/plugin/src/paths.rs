//! The server's paths as the catalogue's.
//!
//! * `./shop/orders` is `shop/orders`. Temporary tables, which the server names by a path outside its data directory, are in
//!   a database of their own that no SQL name can reach.

/// Where temporary tables are kept. Emptied at start: their owners are gone.
pub const TEMPORARY: &str = "#tmp";

/// The catalogue's path of what the server calls `path`.
pub fn table_path(path: &str) -> String {
    let relative = path.strip_prefix("./").unwrap_or(path);
    if !relative.starts_with('/') {
        return relative.to_owned();
    }
    format!("{TEMPORARY}/{}", relative.rsplit('/').next().unwrap_or_default())
}

/// The catalogue's name of the database whose directory the server calls `path`.
pub fn database_name(path: &str) -> &str {
    let trimmed = path.trim_end_matches('/');
    trimmed.rsplit('/').next().unwrap_or(trimmed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_the_server_become_those_of_the_catalogue() {
        assert_eq!(table_path("./shop/orders"), "shop/orders");
        assert_eq!(table_path("shop/orders#P#p0"), "shop/orders#P#p0");
        assert_eq!(table_path("/tmp/#sql-temptable-1-2-0"), "#tmp/#sql-temptable-1-2-0");
        assert_eq!(database_name("./shop/"), "shop");
        assert_eq!(database_name("/var/lib/mysql/shop"), "shop");
    }
}
