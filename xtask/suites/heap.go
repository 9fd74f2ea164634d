// Fills the heap from several goroutines, lets the collector run all the time, and prints what it
// finds in it: a name, a tab, a sum.
package main

import (
	"crypto/sha256"
	"fmt"
	"runtime"
	"runtime/debug"
	"sort"
	"sync"
)

const (
	workers = 4
	entries = 60_000
	rounds  = 6
)

type random uint64

func (state *random) next() uint64 {
	*state ^= *state << 13
	*state ^= *state >> 7
	*state ^= *state << 17
	return uint64(*state)
}

type tree struct {
	left, right *tree
	value       uint64
}

func grow(depth int, state *random) *tree {
	if depth == 0 {
		return &tree{value: state.next()}
	}
	return &tree{grow(depth-1, state), grow(depth-1, state), state.next()}
}

func (node *tree) sum() uint64 {
	if node == nil {
		return 0
	}
	return node.value + 3*node.left.sum() + 5*node.right.sum()
}

// A map whose values are replaced again and again, so that most of what is allocated is garbage.
func churn(seed uint64) uint64 {
	state := random(seed)
	values := make(map[uint64][]byte)
	for round := uint64(0); round < rounds; round++ {
		for key := uint64(0); key < entries; key++ {
			value := make([]byte, 100+state.next()%900)
			for at := range value {
				value[at] = byte(key*31 + round + uint64(at))
			}
			values[key] = value
		}
		for key := round; key < entries; key += 7 {
			delete(values, key)
		}
	}
	keys := make([]uint64, 0, len(values))
	for key := range values {
		keys = append(keys, key)
	}
	sort.Slice(keys, func(a, b int) bool { return keys[a] < keys[b] })
	sum := uint64(0)
	for _, key := range keys {
		for at, found := range values[key] {
			if found != byte(key*31+rounds-1+uint64(at)) {
				panic(fmt.Sprintf("wrong byte %d of the value of %d: %d", at, key, found))
			}
			sum = sum*131 + uint64(found)
		}
	}
	return sum
}

func main() {
	debug.SetGCPercent(40)
	var wait sync.WaitGroup
	sums := make([]uint64, workers)
	for worker := range sums {
		wait.Add(1)
		go func(worker int) {
			defer wait.Done()
			sums[worker] = churn(uint64(worker) + 1)
		}(worker)
	}
	state := random(99)
	trees := uint64(0)
	for round := 0; round < 8; round++ {
		trees = trees*7 + grow(18, &state).sum()
	}
	wait.Wait()
	for worker, sum := range sums {
		fmt.Printf("map %d\t%x\n", worker, sum)
	}
	fmt.Printf("trees\t%x\n", trees)
	// A stack that grows by copying.
	fmt.Printf("deep recursion\t%x\n", deep(200_000, [16]uint64{1}))
	// Large blocks come from and go to the system.
	hash := sha256.New()
	for round := byte(0); round < 8; round++ {
		block := make([]byte, 24<<20)
		for at := range block {
			block[at] = byte(at>>12) ^ round
		}
		debug.FreeOSMemory()
		hash.Write(block)
	}
	fmt.Printf("blocks\t%x\n", hash.Sum(nil))
	runtime.GC()
}

func deep(left int, carried [16]uint64) uint64 {
	if left == 0 {
		return carried[0]
	}
	carried[left%16] += uint64(left) * carried[(left+1)%16]
	return deep(left-1, carried) ^ carried[left%16]
}
