// Asks much of a C++ compiler: deep and wide templates, and what the standard library has of them.
#include <algorithm>
#include <array>
#include <functional>
#include <future>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace {

template <std::size_t Number>
struct Shape {
    std::array<double, Number % 7 + 1> sides{};
    std::string name = "shape " + std::to_string(Number);

    double area() const {
        return std::accumulate(sides.begin(), sides.end(), double(Number), std::multiplies<>());
    }

    auto key() const { return std::make_tuple(Number, name, area()); }
};

template <std::size_t Number>
struct Store {
    std::map<decltype(std::declval<Shape<Number>>().key()), std::vector<Shape<Number>>> shapes;
    std::unordered_map<std::string, std::optional<Shape<Number>>> by_name;
    std::variant<Shape<Number>, Shape<Number + 1>, std::set<std::array<int, Number % 5 + 1>>> last;
    std::function<double(const Shape<Number> &)> measure = [](const Shape<Number> &shape) {
        return shape.area() * Number;
    };

    std::string work(std::mt19937 &random) {
        for (std::size_t round = 0; round < 10; round++) {
            Shape<Number> shape;
            std::generate(shape.sides.begin(), shape.sides.end(), std::ref(random));
            by_name[shape.name] = shape;
            shapes[shape.key()].push_back(shape);
            last = shape;
        }
        std::ostringstream text;
        for (auto &[key, found] : shapes) {
            std::sort(found.begin(), found.end(), [](auto &one, auto &other) {
                return one.area() < other.area();
            });
            text << std::get<1>(key) << ' ' << measure(found.front()) << '\n';
        }
        std::visit([&](auto &which) { text << sizeof which; }, last);
        return std::regex_replace(text.str(), std::regex("[0-9]+"), "#");
    }
};

template <std::size_t... Numbers>
std::size_t all(std::index_sequence<Numbers...>) {
    std::mt19937 random(7);
    return (Store<Numbers>().work(random).size() + ...);
}

}  // namespace

int main() {
    auto later = std::async([] { return all(std::make_index_sequence<STORES>()); });
    return later.get() == 0;
}
